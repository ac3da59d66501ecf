// PyTorch's threads for the CPU kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../cpu/parallel.h"

namespace vitadapter::bind {

inline void torch_pool(int64_t begin, int64_t end, int64_t grain, cpu::RangeFunction function, void* context) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t from, int64_t to) { function(from, to, context); });
}

}  // namespace vitadapter::bind
