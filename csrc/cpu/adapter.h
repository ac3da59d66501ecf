// The CPU kernels of the adapter op; the mathematics is in ../common/adapter.h.
#pragma once

#include "../common/adapter.h"
#include "level.h"
#include "parallel.h"

namespace vitadapter::cpu {

// Runs a problem at a level that this machine has. The portable kernel serves what the others do not: float64, and
// problems without rows.
void adapter_forward(Level level, const AdapterForward& problem, ParallelFor parallel_for);
void adapter_backward(Level level, const AdapterBackward& problem, ParallelFor parallel_for);

// T is double where the tensors are float64, else float: the type of the hidden layer and of every sum.
template <typename T>
void adapter_forward_portable(const AdapterForward& problem, ParallelFor parallel_for);
template <typename T>
void adapter_backward_portable(const AdapterBackward& problem, ParallelFor parallel_for);

// adapter_simd.h on one engine each; rows are at least 1.
void adapter_forward_avx2(const AdapterForward& problem, ParallelFor parallel_for);
void adapter_backward_avx2(const AdapterBackward& problem, ParallelFor parallel_for);
void adapter_forward_avx512(const AdapterForward& problem, ParallelFor parallel_for);
void adapter_backward_avx512(const AdapterBackward& problem, ParallelFor parallel_for);
// Where the compute dtype is bfloat16.
void adapter_forward_bf16(const AdapterForward& problem, ParallelFor parallel_for);
void adapter_backward_bf16(const AdapterBackward& problem, ParallelFor parallel_for);

}  // namespace vitadapter::cpu
