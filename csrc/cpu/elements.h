// Runs of elements of any dtype, read as float or double and written back.
#pragma once

#include "../common/dtype.h"

namespace vitadapter::cpu {

// Elements [begin, begin + count) as T; the switch on the dtype stands outside the loops.
template <typename T>
void read(Operand operand, int64_t begin, int64_t count, T* out) {
  auto convert = [&](auto* data, auto to_wide) {
    for (int64_t i = 0; i < count; ++i) out[i] = T(to_wide(data[begin + i]));
  };
  auto same = [](auto value) { return value; };
  switch (operand.dtype) {
    case DType::kFloat32: return convert(static_cast<const float*>(operand.data), same);
    case DType::kBFloat16: return convert(static_cast<const uint16_t*>(operand.data), from_bfloat16);
    case DType::kFloat16: return convert(static_cast<const uint16_t*>(operand.data), from_float16);
    case DType::kFloat64: return convert(static_cast<const double*>(operand.data), same);
  }
}

template <typename T>
void write(Result result, int64_t begin, int64_t count, const T* in) {
  auto convert = [&](auto* data, auto to_narrow) {
    for (int64_t i = 0; i < count; ++i) data[begin + i] = to_narrow(in[i]);
  };
  switch (result.dtype) {
    case DType::kFloat32: return convert(static_cast<float*>(result.data), [](T v) { return float(v); });
    case DType::kBFloat16:
      return convert(static_cast<uint16_t*>(result.data), [](T v) { return to_bfloat16(float(v)); });
    case DType::kFloat16: return convert(static_cast<uint16_t*>(result.data), [](T v) { return to_float16(float(v)); });
    case DType::kFloat64: return convert(static_cast<double*>(result.data), [](T v) { return double(v); });
  }
}

}  // namespace vitadapter::cpu
