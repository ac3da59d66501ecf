// How do the rows of a tensor come into the products and leave them? Conversion between any dtype and float or an
// engine's elements, transposition, and dropout.
#pragma once

#include "../../common/dtype.h"
#include "../../common/philox.h"
#include "unit.h"

namespace vitadapter::cpu {
namespace {

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t multiple_of(int64_t step, int64_t n) { return quotient_up(n, step) * step; }

inline Operand at(Operand operand, int64_t index) {
  if (!operand.data) return operand;
  return {static_cast<const char*>(operand.data) + index * element_size(operand.dtype), operand.dtype};
}
inline Result at(Result result, int64_t index) {
  return {static_cast<char*>(result.data) + index * element_size(result.dtype), result.dtype};
}

// One vector from any dtype but float64.
template <class E>
VA_INLINE typename E::Vector load_vector(Operand from, int64_t index) {
  switch (from.dtype) {
    case DType::kFloat32: return E::load(static_cast<const float*>(from.data) + index);
    case DType::kBFloat16: return E::load_bfloat16(static_cast<const uint16_t*>(from.data) + index);
    default: return E::load_float16(static_cast<const uint16_t*>(from.data) + index);
  }
}

template <class E>
void read_floats(Operand from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + E::kLanes <= count; i += E::kLanes) E::store(to + i, load_vector<E>(from, i));
  for (; i < count; ++i) to[i] = load<float>(from, i);
}

// Writes vectors of floats, an even number, as `to`'s dtype.
template <class E, int kVectors>
VA_INLINE void store_vectors(Result to, int64_t index, const typename E::Vector (&v)[kVectors], bool stream) {
  using Vector = typename E::Vector;
  if (to.dtype == DType::kFloat32) {
    float* out = static_cast<float*>(to.data) + index;
    VA_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      stream ? E::stream(out + i * E::kLanes, v[i]) : E::store(out + i * E::kLanes, v[i]);
    }
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(to.data) + index;
  const bool flushes = to.dtype == DType::kBFloat16 && E::bfloat16_would_flush(v);
  VA_UNROLL
  for (int i = 0; i < kVectors; i += 2) {
    const Vector both = to.dtype == DType::kFloat16 ? E::to_float16(v[i], v[i + 1])
                        : flushes                   ? E::Exact::to_bfloat16(v[i], v[i + 1])
                                                    : E::to_bfloat16(v[i], v[i + 1]);
    stream ? E::stream(out + i * E::kLanes, both) : E::store(out + i * E::kLanes, both);
  }
}

template <class E>
void write_floats(const float* from, int64_t count, Result to) {
  int64_t i = 0;
  for (; i + 2 * E::kLanes <= count; i += 2 * E::kLanes) {
    const typename E::Vector two[] = {E::load(from + i), E::load(from + i + E::kLanes)};
    store_vectors<E>(to, i, two, false);
  }
  for (; i < count; ++i) store(to, i, from[i]);
}

// Rounded as an operand of floats; pairs are rounded when they are made.
template <class E>
VA_INLINE typename E::Vector rounded_operand(typename E::Vector v, DType compute) {
  if (E::kPerUnit == 2 || compute == DType::kFloat32) return v;
  return compute == DType::kBFloat16 ? E::rounded_to_bfloat16(v) : E::rounded_to_float16(v);
}

// Floats to elements; both have room for `padded`, a multiple of kLanes·kPerUnit, and zeros from `count` on.
template <class E>
void floats_to_elements(float* from, DType compute, int64_t count, int64_t padded, typename E::Element* to) {
  using Vector = typename E::Vector;
  for (int64_t i = count; i < padded; ++i) from[i] = 0;
  for (int64_t i = 0; i < padded; i += E::kLanes * E::kPerUnit) {
    Vector v[E::kPerUnit];
    VA_UNROLL
    for (int part = 0; part < E::kPerUnit; ++part) {
      v[part] = rounded_operand<E>(E::load(from + i + part * E::kLanes), compute);
    }
    E::store(to + i, E::to_elements(v));
  }
}

// Floats that are rounded already, times what floats need no rounding for.
template <class E>
void factored_to_elements(float* from, DType compute, int64_t count, int64_t padded, typename E::Element* to) {
  floats_to_elements<E>(from, E::kPerUnit == 1 ? DType::kFloat32 : compute, count, padded, to);
}

// Whether a tensor of this dtype is an operand as it is.
template <class E>
bool is_element(DType dtype, DType compute) {
  return E::kPerUnit == 2 ? dtype == DType::kBFloat16 : dtype == DType::kFloat32 && compute == DType::kFloat32;
}

// A row as an operand: rounded to the compute dtype, zeros from `count` to `padded`. `floats` is room for `padded`.
template <class E>
void read_operand(Operand from, DType compute, int64_t count, int64_t padded, float* floats, typename E::Element* to) {
  if (is_element<E>(from.dtype, compute)) {
    memcpy(to, from.data, count * sizeof *to);
    for (int64_t i = count; i < padded; ++i) to[i] = 0;
    return;
  }
  read_floats<E>(from, count, floats);
  if (from.dtype == compute) return factored_to_elements<E>(floats, compute, count, padded, to);
  floats_to_elements<E>(floats, compute, count, padded, to);
}

// to[u][row] = from[row][u] of at most kLanes rows and `units` columns; whole vectors of `from` are read.
template <class E>
void transpose_rows(const Unit* from, int64_t from_stride, int64_t units, Unit* to, int64_t to_stride,
                    int64_t rows = E::kLanes) {
  typename E::Vector v[E::kLanes];
  for (int64_t u = 0; u < units; u += E::kLanes) {
    VA_UNROLL
    for (int i = 0; i < E::kLanes; ++i) v[i] = E::load(from + least(i, rows - 1) * from_stride + u);
    E::transpose(v);
    VA_UNROLL
    for (int i = 0; i < E::kLanes; ++i) {
      Unit* out = to + (u + i) * to_stride;
      if (u + i < units && rows >= E::kLanes) E::store(out, v[i]);
      if (u + i < units && rows < E::kLanes) E::store_first(reinterpret_cast<float*>(out), v[i], rows);
    }
  }
}

// The dropout factors of one row, in whole groups of four.
inline void dropout_factors(const Dropout& dropout, int64_t row, int64_t count, float* factors) {
  for (int64_t column = 0; column < count; column += 4) {
    const Philox4 words = dropout.words(row, column);
    for (int i = 0; i < 4; ++i) factors[column + i] = dropout.factor<float>(words.word[i]);
  }
}

}  // namespace
}  // namespace vitadapter::cpu
