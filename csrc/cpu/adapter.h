// The CPU kernels of the adapter op; the mathematics is in ../common/adapter.h.
#pragma once

#include "../common/adapter.h"
#include "parallel.h"

namespace vitadapter::cpu {

// T is double where the tensors are float64, else float: the type of the hidden layer and of every sum.
template <typename T>
void adapter_forward(const AdapterForward& problem, ParallelFor parallel_for);
template <typename T>
void adapter_backward(const AdapterBackward& problem, ParallelFor parallel_for);

}  // namespace vitadapter::cpu
