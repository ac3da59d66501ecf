// How is an element of a tensor read and written? Kernels see raw pointers with a dtype beside them; the conversions
// are our own, so that the host and every GPU give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define VA_HOST_DEVICE __host__ __device__
#else
#define VA_HOST_DEVICE
#endif

namespace vitadapter {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

VA_HOST_DEVICE inline int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// A read-only tensor: data is null where an optional one is absent.
struct Operand {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// A tensor to write: data is null where nobody asked for it.
struct Result {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
};

VA_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

VA_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

VA_HOST_DEVICE inline float from_bfloat16(uint16_t half) { return float_of(uint32_t(half) << 16); }

// Rounds to nearest, ties to even; a NaN stays one.
VA_HOST_DEVICE inline uint16_t to_bfloat16(float value) {
  uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40u);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

VA_HOST_DEVICE inline float from_float16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // A subnormal counts steps of 2^-24. No float32 subnormal may come in between: the processor may flush those to 0.
  if (magnitude < 0x400u) return float_of(sign | bits_of(float(magnitude) * 0x1p-24f));
  return float_of(sign | ((magnitude << 13) + 0x38000000u));
}

// Rounds to nearest, ties to even; what is above 65504 by half a step or more becomes infinite.
VA_HOST_DEVICE inline uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u) {
    // A float16 subnormal: adding 0.5 leaves its 2^-24 steps in the low bits, rounded by the hardware.
    return sign | uint16_t(bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u);
  }
  return sign | uint16_t((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

template <typename T>
VA_HOST_DEVICE inline T load(Operand operand, int64_t index) {
  switch (operand.dtype) {
    case DType::kFloat32: return T(static_cast<const float*>(operand.data)[index]);
    case DType::kBFloat16: return T(from_bfloat16(static_cast<const uint16_t*>(operand.data)[index]));
    case DType::kFloat16: return T(from_float16(static_cast<const uint16_t*>(operand.data)[index]));
    default: return T(static_cast<const double*>(operand.data)[index]);
  }
}

template <typename T>
VA_HOST_DEVICE inline void store(Result result, int64_t index, T value) {
  switch (result.dtype) {
    case DType::kFloat32: static_cast<float*>(result.data)[index] = float(value); return;
    case DType::kBFloat16: static_cast<uint16_t*>(result.data)[index] = to_bfloat16(float(value)); return;
    case DType::kFloat16: static_cast<uint16_t*>(result.data)[index] = to_float16(float(value)); return;
    default: static_cast<double*>(result.data)[index] = double(value);
  }
}

// The value as `dtype` holds it.
template <typename T>
VA_HOST_DEVICE inline T rounded(T value, DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return T(float(value));
    case DType::kBFloat16: return T(from_bfloat16(to_bfloat16(float(value))));
    case DType::kFloat16: return T(from_float16(to_float16(float(value))));
    default: return value;
  }
}

}  // namespace vitadapter
