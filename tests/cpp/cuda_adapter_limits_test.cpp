// What of the adapter's fast CUDA kernels does no sampled trial reach? What they refuse, NaN and infinity, indices
// beyond 2^31, and many runs of one problem.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <string>

#include "cuda_adapter_cases.h"

namespace vitadapter::test {
namespace {

// One problem for each arithmetic.
const std::vector<Numbers> kArithmetics{kNumbers[0], kNumbers[2], kNumbers[4], kNumbers[5]};

// What is left to the simple kernels, and what does not fit, is said to be.
void check_refusals() {
  const auto check = [](bool served, const CaseOptions& o, const AdapterRequest& request, const char* what,
                        int64_t dim = 0) {
    const auto c = make_case(o);
    if (dim) c->forward.dim = c->backward.dim = dim;
    Outputs outputs(*c, kAllGrads);
    const std::string said = std::string(what) + (served ? " was not served" : " was served");
    expect(cuda::adapter_forward_fast(outputs.forward(*c), nullptr, request) == served, said);
    const AdapterBackward backward = outputs.backward(*c);
    const int64_t bytes = cuda::adapter_backward_workspace(backward, request);
    expect((bytes >= 0) == served, said + " with memory for the backward pass");
    const Workspace workspace(std::max<int64_t>(bytes, 0));
    expect(cuda::adapter_backward_fast(backward, workspace.bytes.get(), nullptr, request) == served,
           said + " in the backward pass");
  };
  settings = Settings{};
  settings.dry = true;
  CaseOptions wide = plain_options(3, 8, 2);
  wide.x = wide.down = wide.up = wide.compute = DType::kFloat64;
  check(false, wide, {}, "float64");
  check(false, plain_options(0, 8, 2), {}, "a problem without rows");
  check(false, plain_options(3, 8, 0), {}, "rank 0");
  check(false, plain_options(3, 8, 257), {}, "rank 257");
  check(true, plain_options(3, 8, 256), {}, "rank 256");
  check(true, plain_options(3, 8, 1), {}, "a row of 2^22 elements", 1 << 22);
  check(false, plain_options(3, 8, 1), {}, "a longer row", (1 << 22) + 1);
  check(false, plain_options(300, 128, 64), {48, -1}, "a tile of 48 rows");
  check(true, plain_options(300, 128, 64), {64, 1}, "a tile of 64 rows that keeps x");
  check(false, plain_options(300, 8192, 64), {64, 1}, "keeping what has no room");
  check(true, plain_options(3, 8, 2), {0, -1, 5}, "a request for more slices than rows");
  settings.capability = 75;
  check(false, plain_options(3, 8, 2), {}, "sm_75");
}

// A NaN or infinity in x stays in its row.
void check_nan_and_infinity_forward(const Numbers& numbers) {
  settings = Settings{};
  CaseOptions o = plain_options(40, 100, 1, numbers);
  const auto c = make_case(o);
  Outputs clean(*c, 0), touched(*c, 0);
  store(Result{c->down.bytes, c->down.dtype}, 7, 1.0);
  run_forward(clean.forward(*c), {});
  store(c->x.result(), 3 * o.dim + 50, double(NAN));
  store(c->x.result(), 20 * o.dim + 7, double(INFINITY));
  run_forward(touched.forward(*c), {});
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

// In the backward pass, one in x reaches its column of g_down, and one in dy its row of gx, its column of what belongs
// to the columns, and all that belongs to the ranks.
void check_nan_and_infinity_backward(const Numbers& numbers, bool in_x, double value) {
  settings = Settings{};
  CaseOptions o = full_options(40, 100, 1, numbers);
  o.activation = Activation::kIdentity;
  const auto c = make_case(o);
  Outputs clean(*c, kAllGrads), touched(*c, kAllGrads);
  run_forward(clean.forward(*c), {});
  run_backward(clean.backward(*c), {});
  constexpr int64_t kRow = 20, kColumn = 7;
  store((in_x ? c->x : c->grad).result(), kRow * o.dim + kColumn, value);
  AdapterBackward p = touched.backward(*c);
  p.hidden = clean.hidden.bytes;
  run_backward(p, {});
  const auto check = [&](const char* name, const Buffer& before, const Buffer& after, auto reaches) {
    bool same = true, marked = true;
    for (int64_t i = 0; i < after.count; ++i) {
      if (reaches(i)) {
        // Where two infinities meet there may be a NaN. Elsewhere it would come from a rank that is not there.
        const bool meet = &after == &touched.scale_grad || (&after == &touched.x_grad && i % o.dim == kColumn);
        marked &= std::isnan(value) ? std::isnan(after.at(i)) : std::isinf(after.at(i)) || (meet && after.at(i) != 0);
      } else {
        same &= after.at(i) == before.at(i);
      }
    }
    const std::string of = std::string(" in ") + (in_x ? "x" : "dy") + ", seen in " + name;
    expect(same, std::to_string(value) + of + ", changed what it has no part in");
    expect(marked, std::to_string(value) + of + ", got lost");
  };
  const auto all = [&](int64_t) { return !in_x; };
  const auto column = [&](int64_t i) { return !in_x && i == kColumn; };
  check("x_grad", clean.x_grad, touched.x_grad, [&](int64_t i) { return !in_x && i / o.dim == kRow; });
  check("down_grad", clean.down_grad, touched.down_grad, [&](int64_t i) { return !in_x || i == kColumn; });
  check("down_bias_grad", clean.down_bias_grad, touched.down_bias_grad, all);
  check("up_grad", clean.up_grad, touched.up_grad, column);
  check("up_bias_grad", clean.up_bias_grad, touched.up_bias_grad, column);
  check("scale_grad", clean.scale_grad, touched.scale_grad, column);
}

// Zeros that take no memory until they are touched.
struct Zeros {
  int64_t bytes;
  char* begin;

  explicit Zeros(int64_t bytes) : bytes(bytes) {
    void* const memory =
        mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    begin = memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
    expect(begin, "no address space for 2^31 elements");
  }
  Zeros(const Zeros&) = delete;
  ~Zeros() {
    if (begin) munmap(begin, size_t(bytes));
  }
  // All of `small`, in the last rows.
  char* end(const Buffer& small) const { return begin + bytes - small.count * element_size(small.dtype); }
  void put(const Buffer& small) const { memcpy(end(small), small.bytes, size_t(begin + bytes - end(small))); }
  bool has(const Buffer& small) const { return !memcmp(end(small), small.bytes, size_t(begin + bytes - end(small))); }
};

// Indices beyond 2^31: only the last blocks of each launch run, and only the last rows hold anything. In whole numbers,
// so that it does not matter which slice of the rows sums them.
void check_large_indices() {
  constexpr int64_t kDim = 64, kRank = 8, kTile = 64, kRows = (int64_t(1) << 31) / kDim + 3 * kTile + 17;
  const AdapterRequest request{int(kTile), -1, 3000};  // 16 MB hold so many
  CaseOptions o = full_options(17, kDim, kRank, kNumbers[0]);
  o.whole_numbers = true;
  const auto c = make_case(o);
  settings = Settings{};
  Outputs small(*c, kAllGrads), large(*c, kAllGrads);
  run_forward(small.forward(*c), request);
  run_backward(small.backward(*c), request);

  settings.multiprocessors = 1 << 30;
  settings.last_blocks = 4;
  const Zeros x(kRows * kDim * 2), grad(kRows * kDim * 2), y(kRows * kDim * 2), x_grad(kRows * kDim * 2),
      hidden(kRows * kRank * 4);
  x.put(c->x);
  grad.put(c->grad);
  AdapterForward forward = c->forward;
  forward.rows = kRows;
  forward.x = forward.residual = {x.begin, DType::kBFloat16};
  forward.y = {y.begin, DType::kBFloat16};
  forward.hidden = hidden.begin;
  expect(cuda::adapter_forward_fast(forward, nullptr, request), "2^31 elements were not served");
  expect(y.has(small.y), "y is wrong beyond 2^31 elements");
  expect(hidden.has(small.hidden), "hidden is wrong beyond 2^31 elements");

  AdapterBackward backward = large.backward(*c);
  backward.rows = kRows;
  backward.x = forward.x;
  backward.grad = {grad.begin, DType::kBFloat16};
  backward.hidden = hidden.begin;
  backward.x_grad = {x_grad.begin, DType::kBFloat16};
  // One at a time: then the last blocks are those of the last rows.
  for (Result AdapterBackward::* wanted :
       {&AdapterBackward::x_grad, &AdapterBackward::down_grad, &AdapterBackward::down_bias_grad,
        &AdapterBackward::up_grad, &AdapterBackward::up_bias_grad, &AdapterBackward::scale_grad}) {
    AdapterBackward p = backward;
    p.x_grad = p.down_grad = p.down_bias_grad = p.up_grad = p.up_bias_grad = p.scale_grad = {};
    p.*wanted = backward.*wanted;
    const Zeros workspace(std::max<int64_t>(cuda::adapter_backward_workspace(p, request), 1));
    expect(cuda::adapter_backward_fast(p, workspace.begin, nullptr, request), "2^31 elements were not served backward");
  }
  expect(x_grad.has(small.x_grad), "x_grad is wrong beyond 2^31 elements");
  for (size_t i = 3; i < small.all().size(); ++i) {
    const auto [name, buffer] = small.all()[i];
    expect_same_bits("fast adapter kernels", 0, name, *buffer, *large.all()[i].second, "beyond 2^31 elements");
  }
}

// scale ∘ up may be too small for float16 where g, which a loss scale makes large, is not.
void check_small_scales() {
  settings = Settings{};
  for (bool is_channel : {false, true}) {
    CaseOptions o = full_options(40, 100, 8, kNumbers[2]);
    o.scale_is_channel = is_channel;
    const auto c = make_case(o);
    const auto multiply = [](Buffer& buffer, double factor) {
      for (int64_t i = 0; i < buffer.count; ++i) store(buffer.result(), i, factor * buffer.at(i));
    };
    multiply(c->up, 1e-4);
    multiply(c->scale, 1e-4);
    multiply(c->grad, 1000);
    Outputs outputs(*c, kAllGrads);
    run_forward(outputs.forward(*c), {});
    run_backward(outputs.backward(*c), {});
    compare("fast adapter kernels, small scales", is_channel, *c, outputs, exact_of(*c));
  }
}

// Many orders of one problem, on several devices and by several plans.
void check_repeated_runs() {
  for (const Numbers& numbers : kArithmetics) {
    Trial trial;
    trial.options = full_options(150, 140, 40, numbers);
    trial.options.dropout = trial.options.dropout_out = trial.options.drop_path = 0.3;
    run_trial(8, 0, trial, 20);
  }
}

}  // namespace

int check_adapter_limits() {
  const int before = failures;
  begin_case(5, 0);
  check_refusals();
  for (const Numbers& numbers : kArithmetics) {
    check_nan_and_infinity_forward(numbers);
    for (bool in_x : {false, true}) {
      for (double value : {NAN, INFINITY}) check_nan_and_infinity_backward(numbers, in_x, value);
    }
  }
  check_large_indices();
  check_small_scales();
  check_repeated_runs();
  std::printf("fast adapter kernels: limits, %d failures\n", failures - before);
  return failures - before;
}

}  // namespace vitadapter::test
