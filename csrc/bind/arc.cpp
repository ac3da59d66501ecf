// The arc op for PyTorch: its schemas, and its CPU kernels. Called through vitadapter_ext/ops/arc.py.
#include "arc.h"

#include <torch/csrc/stable/library.h>

#include "../cpu/arc.h"
#include "torch_pool.h"

namespace vitadapter::bind {
namespace {

struct Cpu {
  static void forward(const Tensor&, const ArcForward& problem) { cpu::arc_forward(cpu::level(), problem, torch_pool); }
  static void backward(const Tensor&, const ArcBackward& problem) {
    cpu::arc_backward(cpu::level(), problem, torch_pool);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vitadapter, library) {
  library.def(
      "arc_forward(Tensor x, Tensor basis, Tensor rescale, Tensor? bias, Tensor? seed, float dropout, "
      "ScalarType compute_dtype, bool allow_tf32, bool save_hidden) -> (Tensor y, Tensor hidden)");
  library.def(
      "arc_backward(Tensor grad, Tensor x, Tensor hidden, Tensor basis, Tensor rescale, Tensor? bias, Tensor? seed, "
      "float dropout, ScalarType compute_dtype, bool allow_tf32, int needs) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(vitadapter, CPU, library) {
  library.impl("arc_forward", TORCH_BOX(&arc_forward<Cpu>));
  library.impl("arc_backward", TORCH_BOX(&arc_backward<Cpu>));
}

}  // namespace vitadapter::bind
