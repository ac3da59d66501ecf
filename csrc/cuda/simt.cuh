// What may a CUDA kernel of this project ask of the machine? A kernel is a struct with a call operator, and all that it
// needs beyond C++ goes through this header: under nvcc each function is one instruction, under a host compiler
// emulator.h does what CUDA's manuals say of that instruction. So the file that runs on a GPU is the file that the
// tests run without one.
//
//   struct Body {
//     static constexpr int kMaxThreads = 256, kMinBlocks = 1;  // per block; blocks that share a multiprocessor
//     static constexpr bool kNeedsSm80 = true;                 // cp.async, ldmatrix and mma are there from sm_80 on
//     VA_DEVICE void operator()() const;                       // what one thread does
//   };
//   launch(stream, blocks, threads, shared_bytes, Body{...});
#pragma once

#include <cmath>

#include "../common/dtype.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <array>
#include <map>
#define VA_DEVICE __device__ __forceinline__
// A variable that the threads of a block share.
#define VA_SHARED(type, name) __shared__ type name
// Before loops over registers, which have no addresses; and before others, that their code be there once.
#define VA_UNROLL _Pragma("unroll")
#define VA_UNROLL_BY(count) VA_PRAGMA(unroll count)
#define VA_PRAGMA(text) _Pragma(#text)
#define VA_ROLL _Pragma("unroll 1")
#else
#include "emulator.h"
#define VA_DEVICE inline
#define VA_SHARED(type, name) type& name = ::vitadapter::cuda::emulator::static_shared<type>()
#define VA_UNROLL
#define VA_UNROLL_BY(count) static_cast<void>(count);
#define VA_ROLL
#endif

namespace vitadapter::cuda {

// A cudaStream_t, without the toolkit's headers.
using Stream = void*;

struct Device {
  int index = 0;
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // the most that one block may ask for
  int capability = 0;        // 90 for sm_90
};

struct alignas(8) Words2 {
  uint32_t word[2];
};
struct alignas(16) Words4 {
  uint32_t word[4];
};

#if defined(__CUDACC__)

// ---- threads

VA_DEVICE int thread_index() { return int(threadIdx.x); }
VA_DEVICE int thread_count() { return int(blockDim.x); }
VA_DEVICE int64_t block_index() { return blockIdx.x; }
VA_DEVICE int64_t block_count() { return gridDim.x; }

VA_DEVICE void sync_threads() { __syncthreads(); }
VA_DEVICE void sync_warp() { __syncwarp(); }

// All 32 lanes of a warp take part.
VA_DEVICE uint32_t shuffle(uint32_t value, int source_lane) { return __shfl_sync(~0u, value, source_lane); }
VA_DEVICE uint32_t shuffle_xor(uint32_t value, int lanes) { return __shfl_xor_sync(~0u, value, lanes); }
VA_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(~0u, predicate); }

// Whether this warp is the last of so many, a block each, to come here: it sees what the others wrote before they came.
// *came is 0 before the first one.
VA_DEVICE bool is_last_warp(int* came, int warps) {
  __threadfence();
  __syncwarp();
  int before = 0;
  if (threadIdx.x % 32 == 0) before = atomicAdd(came, 1);
  before = __shfl_sync(~0u, before, 0);
  __syncwarp();
  __threadfence();
  return before == warps - 1;
}

// ---- memory

// The block's dynamic shared memory, 128-byte aligned.
VA_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

// 4, 8 or 16 bytes at an address that is a multiple of that.
VA_DEVICE uint32_t load4(const void* from) { return *static_cast<const uint32_t*>(from); }
VA_DEVICE Words2 load8(const void* from) { return *static_cast<const Words2*>(from); }
VA_DEVICE Words4 load16(const void* from) { return *static_cast<const Words4*>(from); }
VA_DEVICE void store8(void* to, Words2 words) { *static_cast<Words2*>(to) = words; }
VA_DEVICE void store16(void* to, Words4 words) { *static_cast<Words4*>(to) = words; }

// Starts to bring the 128 bytes that hold this one into the L2 cache.
VA_DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

VA_DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Starts to copy 16 bytes from global to shared memory, both 16-byte aligned; of those, the first `bytes` are read and
// zeros stand for the rest.
VA_DEVICE void cp_async16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
// Closes a group of the copies that this thread has started.
VA_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
VA_DEVICE void cp_async_wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Waits until at most `pending` of this thread's groups are under way. The instruction takes a constant, so this may
// wait for more than it must.
VA_DEVICE void cp_async_wait(int pending) {
  if (pending >= 7) return cp_async_wait_for_all_but<7>();
  if (pending >= 3) return cp_async_wait_for_all_but<3>();
  if (pending >= 1) return cp_async_wait_for_all_but<1>();
  cp_async_wait_for_all_but<0>();
}

// Four 8 × 8 matrices of 16-bit elements; lane l names the row l % 8 of matrix l / 8, 16 bytes of shared memory. Lane l
// gets of each matrix the elements (l / 4, 2 (l % 4)) and, in the upper half, the one right of it.
// (No "memory" clobber: who wrote what is read here has been waited for at a barrier, which is one.)
VA_DEVICE void ldmatrix(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}
// The same of the transposed matrices.
VA_DEVICE void ldmatrix_trans(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}

// ---- arithmetic

// c (16 × 8) += a (16 × 16) · b (16 × 8), fragments as in the PTX manual: with g = lane / 4 and t = lane % 4,
// c holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1); a holds (g, 2t..), (g + 8, 2t..), (g, 2t + 8..),
// (g + 8, 2t + 8..); b holds (2t.., g), (2t + 8.., g).
VA_DEVICE void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
VA_DEVICE void mma_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c (16 × 8) += a (16 × 8) · b (8 × 8): a holds (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b (t, g), (t + 4, g).
VA_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two floats in one word, the first in its lower half.
VA_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
VA_DEVICE uint32_t pack_float16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
VA_DEVICE float unpack_float16(uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}
// To TF32's 10 bits of fraction, to nearest, ties away from zero.
VA_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// 2^x and 1 / x, off by 2 units in the last place; a result too small for a normal number is 0.
VA_DEVICE float approximate_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
VA_DEVICE float approximate_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// ---- launches

template <typename Body>
__global__ void __launch_bounds__(Body::kMaxThreads, Body::kMinBlocks) kernel(const __grid_constant__ Body body) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  body();
#else
  // An older architecture gets an empty kernel in place of one that it has no instructions for; nobody launches that.
  if constexpr (!Body::kNeedsSm80) body();
#endif
}

// The current device; a thread reads its properties once, until it turns to another.
inline Device device() {
  thread_local Device last{-1};
  int index = 0;
  cudaGetDevice(&index);
  if (index == last.index) return last;
  int major = 0, minor = 0, shared_bytes = 0;
  cudaDeviceGetAttribute(&last.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  last.index = index;
  last.shared_bytes = shared_bytes;
  last.capability = 10 * major + minor;
  return last;
}

// Blocks of this kernel that one multiprocessor runs at a time; 0 if the device cannot run it. To be asked on each
// device before a launch with more than 48 KB of shared memory, which it allows. A thread remembers the answers, for to
// ask the driver takes longer than to launch.
template <typename Body>
int resident_blocks(int threads, int64_t shared_bytes) {
  using Question = std::array<int64_t, 3>;
  thread_local std::map<Question, int> answers;
  const Question question{device().index, threads, shared_bytes};
  if (const auto found = answers.find(question); found != answers.end()) return found->second;
  cudaFuncAttributes attributes{};
  int blocks = 0;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel<Body>);
  // What was compiled for less, and by the driver for this device, is empty: see kernel().
  if (!error && attributes.ptxVersion < 80 && Body::kNeedsSm80) return 0;
  const auto set = [&](cudaFuncAttribute attribute, int value) {
    if (!error) error = cudaFuncSetAttribute(kernel<Body>, attribute, value);
  };
  // All that there is, so that two plans do not take it from each other.
  set(cudaFuncAttributeMaxDynamicSharedMemorySize, int(device().shared_bytes));
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (!error) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel<Body>, threads, size_t(shared_bytes));
  }
  // An error stays what it is for the caller's cudaGetLastError(), and the next call asks again.
  if (error) return 0;
  if (answers.size() >= 1000) answers.clear();
  return answers[question] = blocks;
}

// Errors are left for cudaGetLastError().
template <typename Body>
void launch(Stream stream, int64_t blocks, int threads, int64_t shared_bytes, const Body& body) {
  kernel<Body><<<unsigned(blocks), threads, size_t(shared_bytes), cudaStream_t(stream)>>>(body);
}

#else  // the same for the host

using emulator::ballot;
using emulator::block_count;
using emulator::block_index;
using emulator::cp_async16;
using emulator::cp_async_commit;
using emulator::cp_async_wait;
using emulator::dynamic_shared;
using emulator::ldmatrix;
using emulator::ldmatrix_trans;
using emulator::mma_bfloat16;
using emulator::mma_float16;
using emulator::mma_tf32;
using emulator::shuffle;
using emulator::shuffle_xor;
using emulator::sync_threads;
using emulator::sync_warp;
using emulator::thread_count;
using emulator::thread_index;

// Blocks run one after the other.
inline bool is_last_warp(int* came, int warps) {
  const uint32_t before = (thread_index() & 31) == 0 ? uint32_t((*came)++) : 0;
  return int(shuffle(before, 0)) == warps - 1;
}

inline uint32_t load4(const void* from) { return emulator::load_aligned<uint32_t>(from); }
inline Words2 load8(const void* from) { return emulator::load_aligned<Words2>(from); }
inline Words4 load16(const void* from) { return emulator::load_aligned<Words4>(from); }
inline void prefetch(const void* from) { static_cast<void>(*static_cast<const volatile char*>(from)); }
inline void store8(void* to, Words2 words) { emulator::store_aligned(to, words); }
inline void store16(void* to, Words4 words) { emulator::store_aligned(to, words); }

inline uint32_t pack_bfloat16(float low, float high) { return uint32_t(to_bfloat16(high)) << 16 | to_bfloat16(low); }
inline uint32_t pack_float16(float low, float high) { return uint32_t(to_float16(high)) << 16 | to_float16(low); }
inline float unpack_float16(uint16_t half) { return from_float16(half); }
inline uint32_t to_tf32(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

inline float flushed(float x) { return std::abs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float approximate_exp2(float x) { return flushed(std::exp2(flushed(x))); }
inline float approximate_reciprocal(float x) { return flushed(1.0f / flushed(x)); }

inline Device device() {
  const emulator::Settings& settings = emulator::settings;
  return {0, settings.multiprocessors, settings.shared_bytes, settings.capability};
}

template <typename Body>
int resident_blocks(int, int64_t shared_bytes) {
  return shared_bytes <= emulator::settings.shared_bytes ? emulator::settings.resident_blocks : 0;
}

template <typename Body>
void launch(Stream, int64_t blocks, int threads, int64_t shared_bytes, const Body& body) {
  static_assert(Body::kMaxThreads % 32 == 0 && Body::kMinBlocks > 0);
  if (threads > Body::kMaxThreads) emulator::fail("%d threads a block; at most %d", threads, Body::kMaxThreads);
  const auto run = [](const void* it) { (*static_cast<const Body*>(it))(); };
  emulator::launch(typeid(Body), blocks, threads, shared_bytes, run, &body);
}

#endif

VA_DEVICE int lane_index() { return thread_index() & 31; }
VA_DEVICE int warp_index() { return thread_index() >> 5; }

}  // namespace vitadapter::cuda
