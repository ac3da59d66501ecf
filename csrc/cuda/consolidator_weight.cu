// A linear layer's weight with the consolidator's branches in it, read and written once: a training step that merges
// its branches asks for it in every forward pass. A thread takes a strip of outputs in one column, so that neighbouring
// threads read neighbours. Where the column stands in a branch, which takes divisions, is found once for the strip.
#include <type_traits>

#include "consolidator.h"
#include "for_each.cuh"

namespace vitadapter::cuda {
namespace {

// Outputs that a thread takes.
constexpr int kStrip = 16;

// Calls body(the dtype as a constant): a choice at each load would keep loads of 2 bytes from being under way together.
template <typename Body>
VA_HOST_DEVICE void with_constant(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32: return body(std::integral_constant<DType, DType::kFloat32>{});
    case DType::kBFloat16: return body(std::integral_constant<DType, DType::kBFloat16>{});
    case DType::kFloat16: return body(std::integral_constant<DType, DType::kFloat16>{});
    default: return body(std::integral_constant<DType, DType::kFloat64>{});
  }
}

template <typename T>
struct ConsolidatorWeightStrip {
  ConsolidatorWeight p;

  VA_HOST_DEVICE void operator()(int64_t index) const {
    const int64_t strip = index / p.in, source = index - strip * p.in, first = strip * kStrip;
    const int outputs = p.out - first < kStrip ? int(p.out - first) : kStrip;
    T sums[kStrip];
    with_constant(p.weight.dtype, [&](auto dtype) {
      VA_UNROLL
      for (int i = 0; i < kStrip; ++i) {
        sums[i] = i < outputs ? load<T>({p.weight.data, decltype(dtype)::value}, (first + i) * p.in + source) : T(0);
      }
    });
    VA_ROLL
    for (int branch = 0; branch < p.branches; ++branch) {
      const ConsolidatorBranch& b = p.branch[branch];
      const int64_t place = b.place(source, p.shuffle), group = place / b.group_in;
      const int64_t column = place - group * b.group_in, before = first - group * b.group_out;
      VA_UNROLL
      for (int i = 0; i < kStrip; ++i) {
        // Whether the output is of the column's group; unsigned, what comes before the group is far beyond it.
        if (i < outputs && uint64_t(before + i) < uint64_t(b.group_out)) {
          sums[i] += load<T>(b.weight, (first + i) * b.group_in + column);
        }
      }
    }
    VA_UNROLL
    for (int i = 0; i < kStrip; ++i) {
      if (i < outputs) store(p.result, (first + i) * p.in + source, sums[i]);
    }
  }
};

}  // namespace

template <typename T>
void consolidator_weight(const ConsolidatorWeight& p, Stream stream) {
  for_each(stream, (p.out + kStrip - 1) / kStrip * p.in, ConsolidatorWeightStrip<T>{p});
}

template void consolidator_weight<float>(const ConsolidatorWeight&, Stream);
template void consolidator_weight<double>(const ConsolidatorWeight&, Stream);

}  // namespace vitadapter::cuda
