// Does the emulator catch a kernel's faults? A pipeline of the kind that real kernels are, right once and with one
// fault at a time, and what it demands of every call: each in a process of its own, which must not end well.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "emulator_checks.h"

namespace vitadapter::test::emulated {
namespace {

// ---- planted faults

// How a child process ended, and all that it printed.
struct Outcome {
  int status = 0;
  std::string said;

  bool well() const { return WIFEXITED(status) && WEXITSTATUS(status) == 0; }
  // By what a fault was noticed: the sanitizer's or the emulator's words, or the child's own.
  std::string how() const {
    for (const char* start : {"AddressSanitizer: ", "runtime error: ", "emulator: ", "wrong results"}) {
      const size_t at = said.find(start);
      if (at == std::string::npos) continue;
      std::string line = said.substr(at, said.find('\n', at) - at);
      const size_t address = line.find(" on address");
      return line.substr(0, address);
    }
    return WIFSIGNALED(status) ? "signal " + std::to_string(WTERMSIG(status)) : "silence";
  }
};

// Runs `run` in a process of its own, which ends with what it returns.
template <typename Run>
Outcome in_child(const Run& run) {
  Outcome outcome;
  std::fflush(nullptr);
  std::FILE* const said = std::tmpfile();
  const pid_t child = said ? fork() : -1;
  if (child < 0) {
    outcome.said = "no process or file for the child";
    return outcome;
  }
  if (child == 0) {
    dup2(fileno(said), 1);
    dup2(fileno(said), 2);
    alarm(60);
    const int result = run();
    std::fflush(nullptr);
    _exit(result);
  }
  waitpid(child, &outcome.status, 0);
  std::rewind(said);
  char part[4096];
  for (size_t bytes; (bytes = std::fread(part, 1, sizeof part, said)) > 0;) outcome.said.append(part, bytes);
  std::fclose(said);
  return outcome;
}

// `noticed`: what must be among the words by which it is.
template <typename Run>
void expect_caught(const std::string& fault, const char* noticed, const Run& run) {
  if (!kHasAddressSanitizer && !std::strcmp(noticed, "AddressSanitizer")) {
    std::printf("  skipped: %s: only AddressSanitizer sees it\n", fault.c_str());
    return;
  }
  const Outcome outcome = in_child(run);
  const std::string how = outcome.how();
  const bool right = !outcome.well() && how.find(noticed) != std::string::npos;
  expect(right, "a fault is noticed by \"%s\": %s", noticed, fault.c_str());
  caught += right;
  std::printf("  %s: %s: %s\n", right ? "caught" : "NOT CAUGHT", fault.c_str(), how.c_str());
}

enum class Fault {
  kNone,
  kNoBarrierBefore,
  kNoBarrierAfter,
  kNoWait,
  kWaitForTooFew,
  kStoreTooFar,
  kLoadTooFar,
  kFragment,
  kMisalignedLoad,
  kMisalignedStore,
  kNoSyncWarp,
  kEarlyReturn,
  kLanesApart,
  kStaticTooEarly,
  kStageTooSmall,
};

// y (rows, 16) = bias + a (rows, depth) · bᵀ (16, depth), and the sum of each row of y. A block has two warps of 16
// rows; a and b come in steps of 64 columns, one of which is loaded while the one before is multiplied.
template <Fault kFault>
struct Pipeline {
  static constexpr int kMaxThreads = 64, kMinBlocks = 1;
  static constexpr bool kNeedsSm80 = true;
  static constexpr int kRows = 32, kColumns = 16, kStep = 64;
  static constexpr int kABytes = kRows * 128, kBBytes = kColumns * 128;
  // The results' way through shared memory: in floats, with 4 or, wrongly, 2 that keep rows apart.
  static constexpr int kStageStride = kColumns + (kFault == Fault::kMisalignedLoad ? 2 : 4);
  static constexpr int kSharedBytes =
      2 * (kABytes + kBBytes) + kRows * kStageStride * 4 - (kFault == Fault::kStageTooSmall ? 20 : 0);
  struct Bias {
    float of_column[kColumns];
  };

  const uint16_t *a, *b;  // bfloat16
  const float* bias;
  float *y, *row_sums;
  int64_t rows;
  int depth;  // a multiple of 8

  int64_t first_row() const { return block_index() * kRows; }
  static Panel<128> a_panel(int step) { return {dynamic_shared() + step % 2 * kABytes, kRows}; }
  static Panel<128> b_panel(int step) { return {dynamic_shared() + 2 * kABytes + step % 2 * kBBytes, kColumns}; }

  // Zeros stand for what is beyond the last row or column.
  void copy(const Panel<128>& to, int to_rows, const uint16_t* from, int64_t from_rows, int step) const {
    for (int i = thread_index(); i < to_rows * 8; i += thread_count()) {
      const int row = i / 8, column = step * kStep + i % 8 * 8;
      const bool inside = row < from_rows && column < depth;
      cp_async16(to.unit(row, i % 8), inside ? from + row * depth + column : from, inside ? 16 : 0);
    }
  }
  void start(int step) const {
    copy(a_panel(step), kRows, a + first_row() * depth, rows - first_row() + (kFault == Fault::kLoadTooFar), step);
    copy(b_panel(step), kColumns, b, kColumns, step);
    cp_async_commit();
  }

  void operator()() const {
    VA_SHARED(Bias, shared_bias);
    const int lane = lane_index(), g = lane / 4, t = lane % 4, warp_row = warp_index() * 16;
    const int64_t first = first_row() + warp_row;
    if (kFault == Fault::kEarlyReturn && first >= rows) return;

    start(0);
    if (thread_index() < kColumns) shared_bias.of_column[thread_index()] = bias[thread_index()];
    if constexpr (kFault != Fault::kStaticTooEarly) sync_threads();
    float c[2][4];
    for (int n = 0; n < 2; ++n) {
      for (int i = 0; i < 4; ++i) c[n][i] = shared_bias.of_column[8 * n + 2 * t + i % 2];
    }

    const int steps = (depth + kStep - 1) / kStep;
    for (int step = 0; step < steps; ++step) {
      const bool more = step + 1 < steps;
      if (more) start(step + 1);
      if constexpr (kFault != Fault::kNoWait) cp_async_wait(more ? 1 + (kFault == Fault::kWaitForTooFew) : 0);
      if constexpr (kFault != Fault::kNoBarrierBefore) sync_threads();
      for (int k = 0; k < kStep / 16; ++k) {
        uint32_t a_words[4], b_words[4];
        ldmatrix(a_words, a_panel(step).unit(warp_row + lane % 16, 2 * k + lane / 16));
        ldmatrix(b_words, b_panel(step).unit(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
        if (kFault == Fault::kFragment) std::swap(a_words[1], a_words[2]);
        mma_bfloat16(c[0], a_words, b_words);
        mma_bfloat16(c[1], a_words, b_words + 2);
      }
      if constexpr (kFault != Fault::kNoBarrierAfter) sync_threads();
    }

    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + 8 * half + g;
      float sum = 0;
      for (int n = 0; n < 2; ++n) sum += c[n][2 * half] + c[n][2 * half + 1];
      if (kFault != Fault::kLanesApart || row < rows) {
        for (int mask = 1; mask < 4; mask *= 2) sum += float_of(shuffle_xor(bits_of(sum), mask));
      }
      if (t == 0 && row < rows + (kFault == Fault::kStoreTooFar)) row_sums[row] = sum;
    }

    float* const stage = reinterpret_cast<float*>(dynamic_shared() + 2 * (kABytes + kBBytes)) + warp_row * kStageStride;
    for (int n = 0; n < 2; ++n) {
      for (int i = 0; i < 4; ++i) stage[(g + i / 2 * 8) * kStageStride + 8 * n + 2 * t + i % 2] = c[n][i];
    }
    if constexpr (kFault != Fault::kNoSyncWarp) sync_warp();
    for (int i = lane; i < 16 * kColumns / 4; i += 32) {
      const int64_t row = first + i / 4;
      const Words4 quad = load16(stage + i / 4 * kStageStride + i % 4 * 4);
      if (row < rows) store16(y + row * kColumns + i % 4 * 4, quad);
    }
  }
};

// In how many of the orders are results wrong? Whole numbers: nothing is rounded.
template <Fault kFault>
int wrong_orders() {
  constexpr int kRows = 45, kColumns = 16, kDepth = 152;
  begin_case(kSeed, 800);
  const auto whole = [](DType dtype, int64_t count) {
    Buffer buffer(dtype, count, false);
    for (int64_t i = 0; i < count; ++i) store(buffer.result(), i, double(draw(-5, 5)));
    return buffer;
  };
  const Buffer a = whole(DType::kBFloat16, kRows * kDepth), b = whole(DType::kBFloat16, kColumns * kDepth);
  const Buffer bias = whole(DType::kFloat32, kColumns);
  std::vector<double> y_exact, sums_exact(kRows);
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      double sum = bias.at(column);
      for (int k = 0; k < kDepth; ++k) sum += a.at(row * kDepth + k) * b.at(column * kDepth + k);
      y_exact.push_back(sum);
      sums_exact[size_t(row)] += sum;
    }
  }
  int wrong = 0;
  for (int order = 1; order <= kOrders; ++order) {
    // A view that begins one element late is no place for vectors.
    const int skipped = kFault == Fault::kMisalignedStore;
    Buffer y = Buffer::poisoned(DType::kFloat32, kRows * kColumns + skipped, false);
    Buffer row_sums = Buffer::poisoned(DType::kFloat32, kRows, false);
    settings.order = uint64_t(order);
    using Body = Pipeline<kFault>;
    launch(nullptr, (kRows + Body::kRows - 1) / Body::kRows, 64, Body::kSharedBytes,
           Body{reinterpret_cast<const uint16_t*>(a.bytes), reinterpret_cast<const uint16_t*>(b.bytes),
                reinterpret_cast<const float*>(bias.bytes), reinterpret_cast<float*>(y.bytes) + skipped,
                reinterpret_cast<float*>(row_sums.bytes), kRows, kDepth});
    bool right = true;
    for (size_t i = 0; i < y_exact.size(); ++i) right = right && y.at(int64_t(i) + skipped) == y_exact[i];
    for (size_t i = 0; i < sums_exact.size(); ++i) right = right && row_sums.at(int64_t(i)) == sums_exact[i];
    wrong += !right;
  }
  if (wrong) std::printf("wrong results in %d of %d orders\n", wrong, kOrders);
  return wrong;
}

}  // namespace

void check_planted_faults() {
  const Outcome none = in_child(wrong_orders<Fault::kNone>);
  expect(none.well() && none.how() == "silence", "the pipeline without a fault is right: %s", none.how().c_str());

  const char *const wrong = "wrong results", *const sanitizer = "AddressSanitizer";
  expect_caught("no __syncthreads before the use", wrong, wrong_orders<Fault::kNoBarrierBefore>);
  expect_caught("no __syncthreads after the use", wrong, wrong_orders<Fault::kNoBarrierAfter>);
  expect_caught("no cp.async wait", "never waited for", wrong_orders<Fault::kNoWait>);
  expect_caught("a wait that leaves one group too many", wrong, wrong_orders<Fault::kWaitForTooFew>);
  expect_caught("a store one element too far", sanitizer, wrong_orders<Fault::kStoreTooFar>);
  expect_caught("a load one row too far", sanitizer, wrong_orders<Fault::kLoadTooFar>);
  expect_caught("a stage that is too small", sanitizer, wrong_orders<Fault::kStageTooSmall>);
  expect_caught("a wrong fragment", wrong, wrong_orders<Fault::kFragment>);
  expect_caught("a misaligned load", "a load of 16 bytes", wrong_orders<Fault::kMisalignedLoad>);
  expect_caught("a misaligned store", "a store of 16 bytes", wrong_orders<Fault::kMisalignedStore>);
  expect_caught("no __syncwarp", wrong, wrong_orders<Fault::kNoSyncWarp>);
  expect_caught("a warp that leaves before the barrier", "waits for ever", wrong_orders<Fault::kEarlyReturn>);
  expect_caught("lanes that skip a shuffle", "while another lane", wrong_orders<Fault::kLanesApart>);
  expect_caught("static shared memory read too early", wrong, wrong_orders<Fault::kStaticTooEarly>);

  // Every barrier and wait of the pipeline in turn.
  statistics.sites.clear();
  expect(wrong_orders<Fault::kNone>() == 0, "the pipeline is right here too");
  const auto sites = statistics.sites;
  expect(sites.size() == 5, "the pipeline has 5 barriers and waits, not %zu", sites.size());
  for (const auto& [site, times] : sites) {
    settings.ignored_site = site;
    expect_caught("line " + std::to_string(site.line) + " ignored", "", wrong_orders<Fault::kNone>);
  }
  settings = {};
}

// What an instruction or a launch demands. A kernel of 64 threads with 250 bytes of shared memory.
void check_demands() {
  const auto refused = [](const char* fault, const char* noticed, const auto& run) {
    expect_caught(fault, noticed, [&] {
      run_kernel(1, 64, 250, run);
      return 0;
    });
  };
  alignas(16) static unsigned char global[64];
  uint32_t words[4];
  float c[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  refused("cp.async to 8-byte alignment", "cp.async to", [] { cp_async16(dynamic_shared() + 8, global, 16); });
  refused("cp.async from 4-byte alignment", "cp.async from", [] { cp_async16(dynamic_shared(), global + 4, 16); });
  refused("cp.async to global memory", "not shared memory", [] { cp_async16(global, global + 16, 16); });
  refused("cp.async to past the end", "not shared memory", [] { cp_async16(dynamic_shared() + 240, global, 16); });
  refused("cp.async of 17 bytes", "17 bytes", [] { cp_async16(dynamic_shared(), global, 17); });
  refused("cp.async of -1 bytes", "-1 bytes", [] { cp_async16(dynamic_shared(), global, -1); });
  refused("cp.async of 9 bytes from 8", "AddressSanitizer", [] {
    const Bytes source(8);
    cp_async16(dynamic_shared(), source.block.get(), 9);
  });
  refused("a copy in no group", "never waited for", [] {
    cp_async16(dynamic_shared(), global, 16);
    cp_async_wait(0);
  });
  refused("ldmatrix from 8-byte alignment", "ldmatrix", [&] { ldmatrix(words, dynamic_shared() + 8); });
  refused("ldmatrix.trans from 2-byte alignment", "ldmatrix", [&] { ldmatrix_trans(words, dynamic_shared() + 2); });
  refused("ldmatrix from past the end", "not shared memory", [&] { ldmatrix(words, dynamic_shared() + 240); });
  refused("ldmatrix from global memory", "not shared memory", [&] { ldmatrix(words, global); });
  refused("a load of 8 bytes from 4-byte alignment", "a load of 8 bytes", [] { load8(global + 4); });
  refused("a store of 8 bytes to 4-byte alignment", "a store of 8 bytes", [] { store8(global + 4, {}); });
  refused("ldmatrix beside mma", "while another lane", [&] {
    if (lane_index() < 8) return ldmatrix(words, dynamic_shared());
    mma_bfloat16(c, a, b);
  });
  refused("mma of bf16 beside f16", "while another lane", [&] {
    if (lane_index() % 2) return mma_float16(c, a, b);
    mma_bfloat16(c, a, b);
  });
  refused("a lane that takes no part in mma", "waits for ever in mma.tf32", [&] {
    if (lane_index() != 13) mma_tf32(c, a, b);
  });
  refused("a lane that takes no part in a vote", "waits for ever in __ballot", [] {
    if (thread_index() != 40) ballot(true);
  });
  refused("warps at two barriers", "is at the barrier in line", [] {
    if (warp_index() == 0) {
      sync_threads();
    } else {
      sync_threads();
    }
  });
  refused("16 bytes from static shared memory that floats alone align", "a load of 16 bytes", [] {
    VA_SHARED(Floats, floats);
    load16(&floats);
  });
  refused("half a warp in __syncthreads, half in __syncwarp", "waits for ever", [] {
    if (lane_index() < 16) return sync_threads();
    sync_warp();
  });
  refused("past the end of dynamic shared memory", "AddressSanitizer", [] { dynamic_shared()[250] = 1; });
  refused("past the end of static shared memory", "AddressSanitizer", [] {
    VA_SHARED(Floats, floats);
    volatile int index = 33;
    *(reinterpret_cast<float*>(&floats) + index) = 1;
  });

  const auto launched = [](const char* fault, const char* noticed, int64_t blocks, int threads, int64_t shared_bytes) {
    expect_caught(fault, noticed, [=] {
      run_kernel(blocks, threads, shared_bytes, [] {});
      return 0;
    });
  };
  launched("no blocks", "a grid of 0", 0, 64, 0);
  launched("more blocks than a grid has", "a grid of 2147483648", int64_t(1) << 31, 64, 0);
  launched("a part of a warp", "a block of 48 threads", 1, 48, 0);
  launched("more threads than the kernel allows", "at most 1024", 1, 1056, 0);
  launched("more shared memory than there is", "bytes of shared memory", 1, 32, 227 * 1024 + 1);
}

}  // namespace vitadapter::test::emulated
