// The adapter op for PyTorch: its schemas, and its CPU kernels. Called through vitadapter_ext/ops/adapter.py.
#include "adapter.h"

#include <torch/csrc/stable/library.h>

#include "../cpu/adapter.h"
#include "torch_pool.h"

namespace vitadapter::bind {
namespace {

struct Cpu {
  static void forward(const Tensor&, const AdapterForward& problem) {
    cpu::adapter_forward(cpu::level(), problem, torch_pool);
  }
  static void backward(const Tensor&, const AdapterBackward& problem) {
    cpu::adapter_backward(cpu::level(), problem, torch_pool);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vitadapter, library) {
  library.def(
      "adapter_forward(Tensor x, Tensor? residual, Tensor down, Tensor? down_bias, Tensor up, Tensor? up_bias, "
      "Tensor? scale, Tensor? seed, float scale_value, int activation, float dropout, float dropout_out, "
      "float drop_path, ScalarType compute_dtype, bool allow_tf32, bool save_hidden) -> (Tensor y, Tensor hidden)");
  library.def(
      "adapter_backward(Tensor grad, Tensor x, Tensor hidden, Tensor down, Tensor? down_bias, Tensor up, "
      "Tensor? up_bias, Tensor? scale, Tensor? seed, bool residual_is_x, float scale_value, int activation, "
      "float dropout, float dropout_out, float drop_path, ScalarType compute_dtype, bool allow_tf32, int needs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(vitadapter, CPU, library) {
  library.impl("adapter_forward", TORCH_BOX(&adapter_forward<Cpu>));
  library.impl("adapter_backward", TORCH_BOX(&adapter_backward<Cpu>));
}

}  // namespace vitadapter::bind
