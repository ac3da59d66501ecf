// The consolidator op for PyTorch: its schemas, and its CPU kernels. Called through vitadapter_ext/ops/consolidator.py.
#include "consolidator.h"

#include <torch/csrc/stable/library.h>

#include "../cpu/consolidator.h"
#include "torch_pool.h"

namespace vitadapter::bind {
namespace {

struct Cpu {
  static void forward(const Tensor&, const ConsolidatorForward& problem) {
    cpu::consolidator_forward(cpu::level(), problem, torch_pool);
  }
  static void backward(const Tensor&, const ConsolidatorBackward& problem) {
    cpu::consolidator_backward(cpu::level(), problem, torch_pool);
  }
  static void weight(const Tensor&, const ConsolidatorWeight& problem) {
    cpu::consolidator_weight(cpu::level(), problem, torch_pool);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vitadapter, library) {
  library.def(
      "consolidator_forward(Tensor x, Tensor? base, Tensor[] weights, Tensor[] biases, Tensor? seed, bool shuffle, "
      "float drop_path, int? samples, ScalarType compute_dtype) -> Tensor");
  library.def(
      "consolidator_backward(Tensor grad, Tensor x, Tensor? x_grad_base, Tensor[] weights, Tensor[] biases, "
      "Tensor? seed, bool shuffle, float drop_path, int? samples, ScalarType compute_dtype, int needs) -> Tensor[]");
  library.def("consolidator_weight(Tensor weight, Tensor[] weights, bool shuffle, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vitadapter, CPU, library) {
  library.impl("consolidator_forward", TORCH_BOX(&consolidator_forward<Cpu>));
  library.impl("consolidator_backward", TORCH_BOX(&consolidator_backward<Cpu>));
  library.impl("consolidator_weight", TORCH_BOX(&consolidator_weight<Cpu>));
}

}  // namespace vitadapter::bind
