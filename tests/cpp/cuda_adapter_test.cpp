// Are the adapter's fast CUDA kernels right? Cases in which every two choices meet (sizes, dtypes, options, devices,
// plans where they fit), each in five orders of its threads, against the float64 loops of adapter_cases.h; then the
// limits that such cases do not reach; then proof that none of the kernels' barriers and waits could be missing.
#include <cxxabi.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "adapter_cases.h"
#include "cuda/adapter.h"
#include "cuda_test.h"
#include "pairwise.h"

namespace vitadapter::test {
namespace {

using cuda::AdapterRequest;
using cuda::emulator::settings;
using cuda::emulator::Settings;
using cuda::emulator::Site;
using cuda::emulator::statistics;

constexpr int kOrders = 5;

// ---- the choices

const std::vector<int64_t> kRows{1, 2, 15, 16, 17, 31, 63, 64, 65, 100, 129, 197, 300};
const std::vector<int64_t> kDims{1, 2, 3, 7, 8, 16, 33, 64, 65, 124, 192, 200, 384, 577, 768, 1280, 1300};
const std::vector<int64_t> kRanks{1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 50, 63, 64, 65, 100, 128, 200, 255, 256};

// x's dtype, the compute dtype, whether TF32 is allowed.
struct Numbers {
  DType x, compute;
  bool allow_tf32;
};
const std::vector<Numbers> kNumbers{
    {DType::kBFloat16, DType::kBFloat16, false}, {DType::kFloat32, DType::kBFloat16, false},
    {DType::kFloat16, DType::kFloat16, false},   {DType::kFloat32, DType::kFloat16, true},
    {DType::kFloat32, DType::kFloat32, false},   {DType::kFloat32, DType::kFloat32, true},
    {DType::kBFloat16, DType::kFloat32, true},   {DType::kFloat16, DType::kFloat32, false},
};

// What the emulated device has: blocks that take many tiles, few, or one; shared memory of sm_90, sm_80 and sm_86.
struct Machine {
  int multiprocessors;
  int64_t shared_bytes;
};
const std::vector<Machine> kMachines{{1, 227 << 10}, {2, 163 << 10}, {1, 99 << 10}, {132, 227 << 10}};

const std::vector<AdapterRequest> kRequests{{0, -1}, {0, 0}, {32, -1}, {64, 1}, {128, -1}};

enum Factor {
  kRowsFactor,
  kDimFactor,
  kRankFactor,
  kNumbersFactor,
  kResidual,
  kWeights,
  kBiases,
  kScale,
  kActivation,
  kDropout,
  kMachine,
  kRequest,
  kAddresses,
  kHidden,
  kFactors
};
// Of each factor.
const std::vector<int> kChoices{int(kRows.size()),
                                int(kDims.size()),
                                int(kRanks.size()),
                                int(kNumbers.size()),
                                3,
                                4,
                                4,
                                3,
                                kActivations,
                                5,
                                int(kMachines.size()),
                                int(kRequests.size()),
                                2,
                                2};

struct Trial {
  CaseOptions options;
  Settings settings;
  AdapterRequest request;
  bool keeps_hidden;
};

Trial make_trial(const std::vector<int>& choice) {
  Trial trial;
  CaseOptions& o = trial.options;
  const Numbers& numbers = kNumbers[size_t(choice[kNumbersFactor])];
  o.rows = kRows[size_t(choice[kRowsFactor])];
  o.dim = kDims[size_t(choice[kDimFactor])];
  o.rank = kRanks[size_t(choice[kRankFactor])];
  o.rows_per_sample = o.rows % 3 ? 1 : o.rows / 3;
  o.x = numbers.x;
  o.compute = numbers.compute;
  o.allow_tf32 = numbers.allow_tf32;
  // What may stand beside float32: one low dtype, bfloat16 where the case does not say.
  const DType low = o.x != DType::kFloat32 ? o.x : o.compute != DType::kFloat32 ? o.compute : DType::kBFloat16;
  const auto of = [&](int bits, int bit) { return bits >> bit & 1 ? low : DType::kFloat32; };
  if (choice[kResidual]) o.residual = of(choice[kResidual], 1);
  o.down = of(choice[kWeights], 0);
  o.up = of(choice[kWeights], 1);
  if (choice[kBiases] & 1) o.down_bias = of(choice[kWeights], 1);
  if (choice[kBiases] & 2) o.up_bias = of(choice[kWeights], 0);
  if (choice[kScale]) o.scale = of(choice[kWeights], 1);
  o.scale_is_channel = choice[kScale] == 2;
  o.scale_value = -0.3;
  o.activation = Activation(choice[kActivation]);
  const int dropout = choice[kDropout];
  if (dropout == 1 || dropout == 4) o.dropout = 0.3;
  if (dropout == 2 || dropout == 4) o.dropout_out = 0.9;
  if (dropout == 3 || dropout == 4) o.drop_path = 0.5;
  o.odd_addresses = choice[kAddresses];
  trial.settings.multiprocessors = kMachines[size_t(choice[kMachine])].multiprocessors;
  trial.settings.shared_bytes = kMachines[size_t(choice[kMachine])].shared_bytes;
  trial.request = kRequests[size_t(choice[kRequest])];
  trial.keeps_hidden = choice[kHidden];
  return trial;
}

// ---- running them

// Where a plan that is asked for does not fit, the kernel's own choice.
bool run(const AdapterForward& problem, const AdapterRequest& request) {
  return cuda::adapter_forward_fast(problem, nullptr, request) || cuda::adapter_forward_fast(problem, nullptr);
}

AdapterForward problem_of(const Case& c, Outputs& outputs, bool keeps_hidden) {
  AdapterForward p = outputs.forward(c);
  if (!keeps_hidden) {
    p.hidden = nullptr;
    outputs.hidden = Buffer();
  }
  return p;
}

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("fast adapter kernel: %s\n", what);
  ++failures;
}

void run_trial(int seed, int number, const Trial& trial, int orders) {
  begin_case(seed, number);
  const auto c = make_case(trial.options);
  settings = trial.settings;
  Outputs first(*c, 0);
  const AdapterForward problem = problem_of(*c, first, trial.keeps_hidden);
  settings.order = uint64_t(number) * 1000;
  if (!run(problem, trial.request)) {
    std::printf("fast adapter kernel, case %d: not served\n", number);
    ++failures;
    return;
  }
  // Where x is no float32 to begin with, TF32 is allowed in vain.
  const Precision precision =
      c->x.dtype == DType::kFloat32 ? tensor_core_precision(c->forward) : precision_of(c->forward);
  compare("fast adapter kernel", number, *c, first, exact(*c, precision, Rounds::kMiddle, false));
  for (int order = 1; order < orders; ++order) {
    Outputs other(*c, 0);
    const AdapterForward again = problem_of(*c, other, trial.keeps_hidden);
    ++settings.order;
    run(again, trial.request);
    expect_same_bits("fast adapter kernel", number, "y", first.y, other.y, "between orders of threads");
    expect_same_bits("fast adapter kernel", number, "hidden", first.hidden, other.hidden, "between orders of threads");
  }
}

std::string kernel_name() {
  int status = 0;
  char* const name = abi::__cxa_demangle(statistics.kernel->name(), nullptr, nullptr, &status);
  std::string text = name;
  std::free(name);
  const std::string space = "vitadapter::cuda::";
  for (size_t at; (at = text.find(space)) != std::string::npos;) text.erase(at, space.size());
  return text;
}

struct Report {
  std::map<std::string, int> cases;  // of each kernel
  int count = 0;
  const int failures_before = failures;
  const std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();

  void add() {
    ++count;
    ++cases[kernel_name()];
  }
  int print(const char* what, int orders) const {
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    for (const auto& [kernel, number] : cases) std::printf("  %s: %d cases\n", kernel.c_str(), number);
    std::printf("%s: %d cases in %d orders of threads, %d failures, %.0f s\n", what, count, orders,
                failures - failures_before, seconds);
    return failures - failures_before;
  }
};

// ---- small problems for what follows

CaseOptions plain_options(int64_t rows, int64_t dim, int64_t rank) {
  CaseOptions o;
  o.rows = rows;
  o.dim = dim;
  o.rank = rank;
  o.x = o.compute = DType::kBFloat16;
  o.activation = Activation::kRelu;
  o.rows_per_sample = 1;
  return o;
}

// float64, rank 0 and ranks above 256 are left to the simple kernel, and what does not fit is said to.
void check_refusals() {
  const auto served = [](CaseOptions o, const AdapterRequest& request = {}) {
    const auto c = make_case(o);
    Outputs outputs(*c, 0);
    return cuda::adapter_forward_fast(outputs.forward(*c), nullptr, request);
  };
  settings = Settings{};
  CaseOptions wide = plain_options(3, 8, 2);
  wide.x = wide.down = wide.up = wide.compute = DType::kFloat64;
  expect(!served(wide), "float64 was served");
  expect(!served(plain_options(3, 8, 0)), "rank 0 was served");
  expect(!served(plain_options(3, 8, 257)), "rank 257 was served");
  expect(served(plain_options(3, 8, 256)), "rank 256 was not served");
  expect(!served(plain_options(300, 128, 64), {48, -1}), "a tile of 48 rows was served");
  expect(served(plain_options(300, 128, 64), {64, 1}), "a tile of 64 rows that keeps x was not served");
  expect(!served(plain_options(300, 8192, 64), {64, 1}), "x was kept where it has no room");
  settings.capability = 75;
  expect(!served(plain_options(3, 8, 2)), "sm_75 was served");
}

// A NaN or infinity in x stays in its row.
void check_nan_and_infinity() {
  settings = Settings{};
  CaseOptions o = plain_options(40, 100, 1);
  o.down = o.up = DType::kFloat32;
  const auto c = make_case(o);
  Outputs clean(*c, 0), touched(*c, 0);
  store(Result{c->down.bytes, c->down.dtype}, 7, 1.0);
  cuda::adapter_forward_fast(clean.forward(*c), nullptr);
  store(c->x.result(), 3 * o.dim + 50, double(NAN));
  store(c->x.result(), 20 * o.dim + 7, double(INFINITY));
  cuda::adapter_forward_fast(touched.forward(*c), nullptr);
  bool same = true, marked = true;
  for (int64_t i = 0; i < touched.y.count; ++i) {
    const int64_t row = i / o.dim, d = i % o.dim;
    if (row == 3) marked &= std::isnan(touched.y.at(i));
    // relu(∞) · up is infinite: a NaN would come from a rank that is not there. (At column 7, ∞ may meet its residual.)
    else if (row == 20)
      marked &= std::isinf(touched.y.at(i)) || d == 7;
    else
      same &= touched.y.at(i) == clean.y.at(i);
  }
  expect(same, "a NaN or infinity changed another row");
  expect(marked, "a NaN or infinity got lost in its row");
}

// Indices beyond 2^31: only the last block runs, on memory of which only the end is touched.
void check_large_indices() {
  constexpr int64_t kDim = 64, kRank = 8, kTile = 64, kRows = (int64_t(1) << 31) / kDim + 3 * kTile + 17;
  settings = Settings{};
  settings.multiprocessors = 1 << 30;
  const auto map = [](int64_t bytes) {
    void* const memory =
        mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
  };
  char* const x = map(kRows * kDim * 2);
  char* const y = map(kRows * kDim * 2);
  char* const hidden = map(kRows * kRank * 4);
  if (!x || !y || !hidden) return expect(false, "no address space for 2^31 elements");
  constexpr int64_t kLast = 17, kBegin = kRows - kLast;
  const auto c = make_case(plain_options(kLast, kDim, kRank));
  memcpy(x + kBegin * kDim * 2, c->x.bytes, size_t(kLast * kDim * 2));
  Outputs small(*c, 0);
  cuda::adapter_forward_fast(small.forward(*c), nullptr, {int(kTile), -1});
  AdapterForward p = c->forward;
  p.rows = kRows;
  p.x = p.residual = {x, DType::kBFloat16};
  p.y = {y, DType::kBFloat16};
  p.hidden = hidden;
  settings.only_block = (kRows + kTile - 1) / kTile - 1;
  expect(cuda::adapter_forward_fast(p, nullptr, {int(kTile), -1}), "2^31 elements were not served");
  expect(!memcmp(y + kBegin * kDim * 2, small.y.bytes, size_t(kLast * kDim * 2)), "y is wrong beyond 2^31 elements");
  expect(!memcmp(hidden + kBegin * kRank * 4, small.hidden.bytes, size_t(kLast * kRank * 4)),
         "hidden is wrong beyond 2^31 elements");
  munmap(x, size_t(kRows * kDim * 2));
  munmap(y, size_t(kRows * kDim * 2));
  munmap(hidden, size_t(kRows * kRank * 4));
}

// Cases with several tiles a block, several chunks and several blocks of ranks.
std::vector<Trial> fault_trials() {
  std::vector<Trial> trials;
  for (int keep : {0, 1}) {
    for (int64_t rank : {8, 40, 150}) {
      for (const Numbers& numbers : {kNumbers[0], kNumbers[4], kNumbers[5]}) {
        Trial trial;
        trial.options = plain_options(200, 200, rank);
        trial.options.x = numbers.x;
        trial.options.compute = numbers.compute;
        trial.options.allow_tf32 = numbers.allow_tf32;
        trial.settings.multiprocessors = 1;
        trial.request.keep = keep;
        trial.keeps_hidden = true;
        trials.push_back(trial);
      }
    }
  }
  return trials;
}

// Whether a child that runs `work` ends well; what it says is not shown.
template <typename Work>
bool ends_well(const Work& work) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    if (!std::freopen("/dev/null", "w", stdout) || !std::freopen("/dev/null", "w", stderr)) _exit(3);
    work();
    _exit(failures ? 1 : 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace

int check_adapter_samples(int seed, int most) {
  Rows rows = pairwise_rows(kChoices, uint64_t(seed));
  expect(meets_all_pairs(kChoices, rows), "the cases do not meet all pairs");
  if (most < int(rows.size())) rows.resize(size_t(most));
  statistics = {};
  Report report;
  for (const std::vector<int>& choice : rows) {
    run_trial(seed, report.count, make_trial(choice), kOrders);
    report.add();
  }
  if (statistics.ldmatrix_conflicts) {
    std::printf("fast adapter kernel: %ld conflicts of banks in ldmatrix\n", long(statistics.ldmatrix_conflicts));
    ++failures;
  }
  return report.print("fast adapter kernels", kOrders);
}

int check_adapter_limits() {
  Report report;
  begin_case(5, 0);
  check_refusals();
  check_nan_and_infinity();
  check_large_indices();
  std::printf("fast adapter kernels: limits, %d failures\n", failures - report.failures_before);
  return failures - report.failures_before;
}

int check_adapter_faults() {
  const int before = failures;
  const std::vector<Trial> trials = fault_trials();
  const auto run_all = [&](const Site& ignored) {
    for (int number = 0; number < int(trials.size()); ++number) {
      Trial trial = trials[size_t(number)];
      trial.settings.ignored_site = ignored;
      run_trial(1, number, trial, kOrders);
    }
  };
  statistics = {};
  run_all({});
  const auto sites = statistics.sites;
  for (const auto& [site, count] : sites) {
    if (!ends_well([&, site = site] { run_all(site); })) continue;
    std::printf("fast adapter kernels: nothing noticed that %s:%d was left out\n", site.file, site.line);
    ++failures;
  }
  std::printf("fast adapter kernels: each of %zu barriers and waits left out, %d times unnoticed\n", sites.size(),
              failures - before);
  return failures - before;
}

int check_adapter_everywhere(int part, int parts) {
  Report report;
  int number = 0;
  std::vector<int> choice(kFactors);
  for (choice[kRowsFactor] = 0; choice[kRowsFactor] < kChoices[kRowsFactor]; ++choice[kRowsFactor]) {
    for (choice[kDimFactor] = 0; choice[kDimFactor] < kChoices[kDimFactor]; ++choice[kDimFactor]) {
      for (choice[kRankFactor] = 0; choice[kRankFactor] < kChoices[kRankFactor]; ++choice[kRankFactor]) {
        for (choice[kNumbersFactor] = 0; choice[kNumbersFactor] < kChoices[kNumbersFactor]; ++choice[kNumbersFactor]) {
          if (++number % parts != part - 1) continue;
          // The rest is drawn.
          begin_case(6, number);
          for (int factor = kResidual; factor < kFactors; ++factor)
            choice[size_t(factor)] = int(draw(0, kChoices[size_t(factor)] - 1));
          run_trial(6, number, make_trial(choice), 2);
          report.add();
          if (report.count % 1000 == 0)
            std::printf("%d cases, %d failures\n", report.count, failures), std::fflush(stdout);
        }
      }
    }
  }
  return report.print("fast adapter kernels, everywhere", 2);
}

std::string adapter_launches() {
  std::map<std::string, std::string> kernels;
  // ViT-B: 64 images of 197 tokens, with what each architecture's blocks may have of shared memory.
  constexpr std::pair<int, int64_t> kArchitectures[] = {{80, 163 << 10}, {90, 227 << 10}, {100, 227 << 10}};
  constexpr int64_t kRows = 12'608;
  for (const auto& [architecture, shared_bytes] : kArchitectures) {
    for (const Numbers& numbers : kNumbers) {
      for (int64_t rank : {16, 64, 256}) {
        settings = Settings{};
        settings.shared_bytes = shared_bytes;
        settings.multiprocessors = 132;
        settings.dry = true;
        CaseOptions o = plain_options(1, 768, rank);
        o.x = numbers.x;
        o.compute = numbers.compute;
        o.allow_tf32 = numbers.allow_tf32;
        begin_case(7, 0);
        const auto c = make_case(o);
        Outputs outputs(*c, 0);
        AdapterForward p = outputs.forward(*c);
        p.rows = kRows;
        cuda::adapter_forward_fast(p, nullptr);
        std::string& entry = kernels[kernel_name()];
        entry += (entry.empty() ? "" : ", ") + ("\"sm_" + std::to_string(architecture)) +
                 "\": {\"threads\": " + std::to_string(statistics.threads) +
                 ", \"shared\": " + std::to_string(statistics.shared_bytes) + "}";
      }
    }
  }
  std::string text = "{";
  for (const auto& [name, entry] : kernels) {
    text += (text.size() > 1 ? ",\n " : "\n ") + ("\"" + name) + "\": {" + entry + "}";
  }
  return text + "\n}";
}

}  // namespace vitadapter::test
