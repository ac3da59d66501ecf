// The adapter op on one engine (simd/unit.h): which of its two ways serves a problem? For the files that compile it for
// an instruction set.
#pragma once

#include "adapter_backward.h"
#include "adapter_few_rows.h"
#include "adapter_forward.h"

namespace vitadapter::cpu {
namespace {

template <class E>
void forward(const AdapterForward& p, ParallelFor parallel_for) {
  has_few_rows(p) ? forward_few_rows<E>(p, parallel_for) : forward_blocks<E>(p, parallel_for);
}

template <class E>
void backward(const AdapterBackward& p, ParallelFor parallel_for) {
  has_few_rows(p) ? backward_few_rows<E>(p, parallel_for) : backward_blocks<E>(p, parallel_for);
}

}  // namespace
}  // namespace vitadapter::cpu
