// What do the products count? Units of 32 bits: a float, or two neighbouring bfloat16 numbers.
//
// An engine E is an instruction set (Avx2, Avx512) with a way to multiply units:
//   E::Element   how an operand of a product is stored: float, or uint16_t for bfloat16
//   E::kPerUnit  elements in a unit
//   E::mac       sum + a·b; for pairs the sum of both products
// and a few ways to make elements and units from vectors of floats; here for floats, in avx512_bf16.h for pairs.
#pragma once

#include <cstdint>

#include "target.h"

namespace vitadapter::cpu {
namespace {

// It may lie over floats or over pairs of bfloat16, which may begin at any of them.
typedef uint32_t __attribute__((may_alias, aligned(2))) Unit;

template <class Isa>
struct Floats : Isa {
  using Element = float;
  static constexpr int kPerUnit = 1;
  using typename Isa::Vector;

  // Whether to_bfloat16 takes a number among these for zero that is none, and what is right then.
  using Exact = Isa;
  template <int kVectors>
  static VA_INLINE bool bfloat16_would_flush(const Vector (&)[kVectors]) {
    return false;
  }

  static VA_INLINE Vector mac(Vector sum, Vector a, Vector b) { return Isa::fma(a, b, sum); }
  static VA_INLINE Vector ones() { return Isa::set(1.0f); }
  // kPerUnit vectors as one of elements.
  static VA_INLINE Vector to_elements(const Vector (&v)[1]) { return v[0]; }
  // One vector as kLanes elements.
  static VA_INLINE void store_elements(float* to, Vector v) { Isa::store(to, v); }
  // kPerUnit rows as units that go down the rows.
  static VA_INLINE Vector units_down(const Vector (&v)[1]) { return v[0]; }
  // kPerUnit rows of kPerUnit·kLanes elements as kPerUnit vectors of such units; a missing second row is zero.
  static VA_INLINE void interleave(const float* row, const float*, Vector (&units)[1]) { units[0] = Isa::load(row); }
};

}  // namespace
}  // namespace vitadapter::cpu
