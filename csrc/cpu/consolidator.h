// The CPU kernels of the consolidator op; the mathematics is in ../common/consolidator.h.
#pragma once

#include "../common/consolidator.h"
#include "level.h"
#include "parallel.h"

namespace vitadapter::cpu {

// Runs a problem at a level that this machine has. The portable kernels serve what the others do not: float64, and
// problems without rows. Level bf16 is avx512's: everything is float32 here once it is read.
void consolidator_forward(Level level, const ConsolidatorForward& problem, ParallelFor parallel_for);
void consolidator_backward(Level level, const ConsolidatorBackward& problem, ParallelFor parallel_for);
void consolidator_weight(Level level, const ConsolidatorWeight& problem, ParallelFor parallel_for);

// Sums are float64, whatever the tensors are.
void consolidator_forward_portable(const ConsolidatorForward& problem, ParallelFor parallel_for);
void consolidator_backward_portable(const ConsolidatorBackward& problem, ParallelFor parallel_for);
void consolidator_weight_portable(const ConsolidatorWeight& problem, ParallelFor parallel_for);

// consolidator_simd.h on one instruction set each; rows are at least 1.
void consolidator_forward_avx2(const ConsolidatorForward& problem, ParallelFor parallel_for);
void consolidator_backward_avx2(const ConsolidatorBackward& problem, ParallelFor parallel_for);
void consolidator_weight_avx2(const ConsolidatorWeight& problem, ParallelFor parallel_for);
void consolidator_forward_avx512(const ConsolidatorForward& problem, ParallelFor parallel_for);
void consolidator_backward_avx512(const ConsolidatorBackward& problem, ParallelFor parallel_for);
void consolidator_weight_avx512(const ConsolidatorWeight& problem, ParallelFor parallel_for);

}  // namespace vitadapter::cpu
