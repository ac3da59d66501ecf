// The portable CPU kernel of the adapter op: standard C++, any processor, any shape, every dtype.
//
// Idea: a block of 32 rows is read once, goes through both products while it is in the cache, and is written once. So
// the forward pass moves 2 streams of rows·dim elements (3 with a separate residual), the backward pass 3 (g, x, gx),
// against about 7 and 12 of the unfused operators. Weights are read into wide, padded panels once a call.
//
// Weight gradients: the rows are cut into chunks whose bounds depend on the shape only; each chunk sums its own panel,
// and the panels are added in order. So the bits do not depend on the number of threads.
#include <algorithm>
#include <vector>

#include "adapter.h"
#include "elements.h"

namespace vitadapter::cpu {
namespace {

constexpr int64_t kBlockRows = 32;
// Panels are padded with zeros to this many columns, so that no inner loop has a tail.
constexpr int64_t kLanes = 8;
// Terms of a product that are added up in registers.
constexpr int64_t kRun = 128;
// A chunk has its own panels of weight gradients, so it must have rows enough to pay for adding them up. All panels
// together stay below 16 MB, or there is one chunk (and so one thread) only.
constexpr int64_t kMinBlocksPerChunk = 8, kPartialBytes = 16 << 20, kMaxChunks = 64;

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
int64_t blocks_of(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// C(m, n) += A(m, k) · B(k, n): A by any strides, n padded. One tile of C stays in registers over a run of k; longer
// sums in one chain of float32 would be less exact than the library's products.
template <int kRows, typename T>
void product_rows(int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t ldb, T* c,
                  int64_t ldc) {
  for (int64_t j = 0; j < n; j += kLanes) {
    T tile[kRows][kLanes] = {};
    for (int64_t p = 0; p < k; ++p) {
      const T* b_row = b + p * ldb + j;
      for (int i = 0; i < kRows; ++i) {
        const T a_value = a[i * a_row + p * a_column];
        for (int lane = 0; lane < kLanes; ++lane) tile[i][lane] += a_value * b_row[lane];
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) c[i * ldc + j + lane] += tile[i][lane];
    }
  }
}

template <typename T>
void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t ldb,
             T* c, int64_t ldc) {
  for (int64_t p = 0; p < k; p += kRun) {
    const int64_t run = std::min(kRun, k - p);
    const T *a_run = a + p * a_column, *b_run = b + p * ldb;
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) {
      product_rows<4>(n, run, a_run + i * a_row, a_row, a_column, b_run, ldb, c + i * ldc, ldc);
    }
    for (; i < m; ++i) product_rows<1>(n, run, a_run + i * a_row, a_row, a_column, b_run, ldb, c + i * ldc, ldc);
  }
}

// A (rows, columns) matrix of T with padded rows, zero at first.
template <typename T>
struct Panel {
  int64_t rows = 0, stride = 0;
  std::vector<T> values;

  Panel(int64_t rows, int64_t columns) : rows(rows), stride(padded(columns)), values(rows * stride) {}
  T* row(int64_t i) { return values.data() + i * stride; }
  const T* row(int64_t i) const { return values.data() + i * stride; }
  void clear() { std::fill(values.begin(), values.end(), T(0)); }
};

// As a product's operand: rounded to the compute dtype where that is the narrower one.
template <typename T>
void read_operand(Operand operand, DType compute, int64_t begin, int64_t count, T* out) {
  read(operand, begin, count, out);
  if (operand.dtype == compute || compute == DType::kFloat32 || compute == DType::kFloat64) return;
  for (int64_t i = 0; i < count; ++i) out[i] = rounded(out[i], compute);
}

template <typename T>
Panel<T> read_matrix(Operand operand, DType compute, int64_t rows, int64_t columns) {
  Panel<T> panel(rows, columns);
  for (int64_t i = 0; i < rows; ++i) read_operand(operand, compute, i * columns, columns, panel.row(i));
  return panel;
}

template <typename T>
Panel<T> transposed(const Panel<T>& panel, int64_t columns) {
  Panel<T> result(columns, panel.rows);
  for (int64_t i = 0; i < panel.rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) result.row(j)[i] = panel.row(i)[j];
  }
  return result;
}

// A vector of `count` elements as T, zeros where it is absent.
template <typename T>
std::vector<T> read_vector(Operand operand, int64_t count) {
  std::vector<T> values(padded(count));
  if (operand.data) read(operand, 0, count, values.data());
  return values;
}

template <typename T>
std::vector<T> read_scale(const AdapterProblem& p) {
  std::vector<T> values(padded(p.dim));
  for (int64_t d = 0; d < p.dim; ++d) values[d] = p.scale_at<T>(d);
  return values;
}

// Multiplies `count` elements of a row by their dropout factors, one Philox call for four.
template <typename T>
void apply_dropout(const Dropout& dropout, int64_t row, int64_t count, T* values) {
  if (!dropout.active()) return;
  for (int64_t j = 0; j < count; j += 4) {
    const Philox4 words = dropout.words(row, j);
    for (int64_t i = j; i < std::min(j + 4, count); ++i) values[i] *= dropout.factor<T>(words.word[i - j]);
  }
}

}  // namespace

template <typename T>
void adapter_forward_portable(const AdapterForward& p, ParallelFor parallel_for) {
  const Panel<T> down = transposed(read_matrix<T>(p.down, p.compute, p.rank, p.dim), p.dim);  // (dim, rank)
  const Panel<T> up = transposed(read_matrix<T>(p.up, p.compute, p.dim, p.rank), p.rank);     // (rank, dim)
  const std::vector<T> down_bias = read_vector<T>(p.down_bias, p.rank), up_bias = read_vector<T>(p.up_bias, p.dim);
  const std::vector<T> scale = read_scale<T>(p);

  for_ranges(parallel_for, blocks_of(p.rows), 1, [&](int64_t begin, int64_t end) {
    Panel<T> x(kBlockRows, p.dim), z(kBlockRows, p.rank), y(kBlockRows, p.dim);
    std::vector<T> residual(p.dim);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row0 = block * kBlockRows, rows = std::min(kBlockRows, p.rows - row0);
      for (int64_t i = 0; i < rows; ++i) {
        read_operand(p.x, p.compute, (row0 + i) * p.dim, p.dim, x.row(i));
        std::copy(down_bias.begin(), down_bias.end(), z.row(i));
        std::copy(up_bias.begin(), up_bias.end(), y.row(i));
      }
      product(rows, down.stride, p.dim, x.row(0), x.stride, 1, down.row(0), down.stride, z.row(0), z.stride);
      for (int64_t i = 0; i < rows; ++i) {
        T* hidden = z.row(i);
        if (p.hidden) std::copy_n(hidden, p.rank, static_cast<T*>(p.hidden) + (row0 + i) * p.rank);
        for (int64_t j = 0; j < p.rank; ++j) hidden[j] = activate(p.activation, hidden[j]).value;
        apply_dropout(p.dropout, row0 + i, p.rank, hidden);
      }
      product(rows, up.stride, p.rank, z.row(0), z.stride, 1, up.row(0), up.stride, y.row(0), y.stride);
      for (int64_t i = 0; i < rows; ++i) {
        T* out = y.row(i);
        apply_dropout(p.dropout_out, row0 + i, p.dim, out);
        const T keep = p.sample_factor<T>(row0 + i);
        read(p.residual, (row0 + i) * p.dim, p.dim, residual.data());
        for (int64_t d = 0; d < p.dim; ++d) out[d] = residual[d] + keep * scale[d] * out[d];
        write(p.y, (row0 + i) * p.dim, p.dim, out);
      }
    }
  });
}

namespace {

// What one chunk of rows adds to the gradients of the parameters; the up-projection's stands transposed.
template <typename T>
struct Partial {
  Panel<T> up_product;  // Gᵀ (rank, dim)
  Panel<T> down_grad;   // (rank, dim)
  std::vector<T> grad_sum, hidden_grad_sum;

  Partial(const AdapterBackward& p)
      : up_product(p.needs_up_product() ? p.rank : 0, p.dim),
        down_grad(p.down_grad.data ? p.rank : 0, p.dim),
        grad_sum(padded(p.dim)),
        hidden_grad_sum(padded(p.rank)) {}

  void add(const Partial& other) {
    auto add_to = [](std::vector<T>& sum, const std::vector<T>& values) {
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += values[i];
    };
    add_to(up_product.values, other.up_product.values);
    add_to(down_grad.values, other.down_grad.values);
    add_to(grad_sum, other.grad_sum);
    add_to(hidden_grad_sum, other.hidden_grad_sum);
  }
};

template <typename T>
void add_column_sums(const Panel<T>& panel, int64_t rows, std::vector<T>& sums) {
  // The block's own sum first: short sums keep float32's rounding small over many rows.
  for (int64_t j = 0; j < panel.stride; j += kLanes) {
    T sum[kLanes] = {};
    for (int64_t i = 0; i < rows; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) sum[lane] += panel.row(i)[j + lane];
    }
    for (int lane = 0; lane < kLanes; ++lane) sums[j + lane] += sum[lane];
  }
}

template <typename T>
void write_parameter_gradients(const AdapterBackward& p, const Panel<T>& up, const std::vector<T>& scale,
                               const Partial<T>& sum) {
  const std::vector<T> up_bias = read_vector<T>(p.up_bias, p.dim);
  if (p.down_grad.data) {
    for (int64_t j = 0; j < p.rank; ++j) write(p.down_grad, j * p.dim, p.dim, sum.down_grad.row(j));
  }
  if (p.down_bias_grad.data) write(p.down_bias_grad, 0, p.rank, sum.hidden_grad_sum.data());
  double scalar_grad = 0;
  for (int64_t d = 0; d < p.dim; ++d) {
    double channel_grad = double(up_bias[d]) * sum.grad_sum[d];
    for (int64_t j = 0; j < p.rank && p.needs_up_product(); ++j) {
      const T product = sum.up_product.row(j)[d];
      channel_grad += double(up.row(d)[j]) * product;
      if (p.up_grad.data) store(p.up_grad, d * p.rank + j, scale[d] * product);
    }
    if (p.up_bias_grad.data) store(p.up_bias_grad, d, scale[d] * sum.grad_sum[d]);
    if (p.scale_grad.data && p.scale_is_channel) store(p.scale_grad, d, channel_grad);
    scalar_grad += channel_grad;
  }
  if (p.scale_grad.data && !p.scale_is_channel) store(p.scale_grad, 0, scalar_grad);
}

}  // namespace

template <typename T>
void adapter_backward_portable(const AdapterBackward& p, ParallelFor parallel_for) {
  const Panel<T> up = read_matrix<T>(p.up, p.compute, p.dim, p.rank);      // (dim, rank)
  const Panel<T> down = read_matrix<T>(p.down, p.compute, p.rank, p.dim);  // (rank, dim)
  const std::vector<T> scale = read_scale<T>(p);
  Panel<T> scaled_up = up;
  for (int64_t d = 0; d < p.dim; ++d) {
    for (int64_t j = 0; j < p.rank; ++j) scaled_up.row(d)[j] *= scale[d];
  }

  const int64_t blocks = blocks_of(p.rows);
  const int64_t partial_bytes = (2 * p.rank + 1) * padded(p.dim) * int64_t(sizeof(T));
  const int64_t most_chunks = std::clamp<int64_t>(kPartialBytes / partial_bytes, 1, kMaxChunks);
  const int64_t blocks_per_chunk = std::max(kMinBlocksPerChunk, (blocks + most_chunks - 1) / most_chunks);
  const int64_t chunks = (blocks + blocks_per_chunk - 1) / blocks_per_chunk;
  std::vector<Partial<T>> partials(std::max<int64_t>(chunks, 1), Partial<T>(p));

  for_ranges(parallel_for, chunks, 1, [&](int64_t begin, int64_t end) {
    Panel<T> g(kBlockRows, p.dim), x(kBlockRows, p.dim), gx(kBlockRows, p.dim);
    Panel<T> z(kBlockRows, p.rank), gh(kBlockRows, p.rank);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      Partial<T>& partial = partials[chunk];
      const int64_t last_block = std::min(blocks, (chunk + 1) * blocks_per_chunk);
      for (int64_t block = chunk * blocks_per_chunk; block < last_block; ++block) {
        const int64_t row0 = block * kBlockRows, rows = std::min(kBlockRows, p.rows - row0);
        for (int64_t i = 0; i < rows; ++i) {
          read_operand(p.grad, p.compute, (row0 + i) * p.dim, p.dim, g.row(i));
          apply_dropout(p.dropout_out, row0 + i, p.dim, g.row(i));
          const T keep = p.sample_factor<T>(row0 + i);
          for (int64_t d = 0; d < p.dim; ++d) g.row(i)[d] *= keep;
          std::copy_n(static_cast<const T*>(p.hidden) + (row0 + i) * p.rank, p.rank, z.row(i));
        }
        gh.clear();
        if (p.needs_hidden_grad()) {
          product(rows, scaled_up.stride, p.dim, g.row(0), g.stride, 1, scaled_up.row(0), scaled_up.stride, gh.row(0),
                  gh.stride);
        }
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < p.rank; ++j) {
            const Activated<T> act = activate(p.activation, z.row(i)[j]);
            z.row(i)[j] = act.value;
            gh.row(i)[j] *= act.slope;
          }
          apply_dropout(p.dropout, row0 + i, p.rank, z.row(i));
          apply_dropout(p.dropout, row0 + i, p.rank, gh.row(i));
        }
        if (p.x_grad.data) {
          gx.clear();
          for (int64_t i = 0; i < rows && p.residual_is_x; ++i) read(p.grad, (row0 + i) * p.dim, p.dim, gx.row(i));
          product(rows, down.stride, p.rank, gh.row(0), gh.stride, 1, down.row(0), down.stride, gx.row(0), gx.stride);
          for (int64_t i = 0; i < rows; ++i) write(p.x_grad, (row0 + i) * p.dim, p.dim, gx.row(i));
        }
        if (p.needs_up_product()) {
          product(p.rank, g.stride, rows, z.row(0), 1, z.stride, g.row(0), g.stride, partial.up_product.row(0),
                  partial.up_product.stride);
        }
        if (p.down_grad.data) {
          for (int64_t i = 0; i < rows; ++i) read_operand(p.x, p.compute, (row0 + i) * p.dim, p.dim, x.row(i));
          product(p.rank, x.stride, rows, gh.row(0), 1, gh.stride, x.row(0), x.stride, partial.down_grad.row(0),
                  partial.down_grad.stride);
        }
        if (p.needs_grad_sum()) add_column_sums(g, rows, partial.grad_sum);
        if (p.down_bias_grad.data) add_column_sums(gh, rows, partial.hidden_grad_sum);
      }
    }
  });
  for (int64_t chunk = 1; chunk < chunks; ++chunk) partials[0].add(partials[chunk]);
  write_parameter_gradients(p, up, scale, partials[0]);
}

template void adapter_forward_portable<float>(const AdapterForward&, ParallelFor);
template void adapter_forward_portable<double>(const AdapterForward&, ParallelFor);
template void adapter_backward_portable<float>(const AdapterBackward&, ParallelFor);
template void adapter_backward_portable<double>(const AdapterBackward&, ParallelFor);

}  // namespace vitadapter::cpu
