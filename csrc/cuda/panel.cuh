// How does a matrix lie in shared memory? In planes of rows of kRowBytes, a row in units of 16 bytes, and the units of
// a row exchanged with one another by the row's number, so that no access of a warp meets one of the 32 banks twice:
// not ldmatrix (one unit of 8 rows), not 16 bytes a lane from 2 rows × 4 units, not one unit of every second row, and
// in rows of 128 bytes not 8 or 4 bytes a lane from 4 rows × 2 units. That costs no byte; padding would.
#pragma once

#include "simt.cuh"

namespace vitadapter::cuda {

template <int kRowBytes>
struct Panel {
  static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes == 128);
  static constexpr int kUnits = kRowBytes / 16;

  unsigned char* base;
  int rows;  // of a plane; the next plane holds the units from kUnits on

  VA_DEVICE unsigned char* unit(int row, int index) const {
    return base + (index / kUnits * rows + row) * kRowBytes + (index % kUnits ^ exchange(row)) * 16;
  }

  VA_DEVICE static int exchange(int row) {
    if constexpr (kUnits == 8) return (row & 1) * 5 ^ (row & 2) ^ (row >> 2 & 1);
    // Two or four rows share the 128 bytes that the banks span.
    return kUnits == 4 ? row >> 1 & 3 : row >> 2 & 1;
  }
};

// In which order do the columns of a matrix take the places of an mma's columns? A lane of an mma holds the columns 2t
// and 2t + 1 (t = lane % 4); with two mma side by side in this order it holds four neighbours, 4t to 4t + 3 of 16: one
// vector of memory and one draw of Philox.
VA_DEVICE constexpr int quad_order(int place) {
  return (place & ~15) + ((place & 7) >> 1) * 4 + (place >> 3 & 1) * 2 + (place & 1);
}

}  // namespace vitadapter::cuda
