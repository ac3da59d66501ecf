// From tensors to a problem: the checks and the translation that the CPU and the CUDA binding of the adapter share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../common/adapter.h"

// PyTorch's own check puts the source file's path into the sentence. The words are made only where the check fails.
#define VA_CHECK(holds, ...)                                                         \
  do {                                                                               \
    if (!(holds)) throw std::runtime_error(::vitadapter::bind::joined(__VA_ARGS__)); \
  } while (false)

namespace vitadapter::bind {

template <typename... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string text(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "of another dtype";
  }
}

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream out;
  for (int64_t size : sizes) out << (out.tellp() ? ", " : "(") << size;
  return (out.tellp() ? out.str() : "(") + (sizes.size() == 1 ? ",)" : ")");
}
inline std::string shape_text(const Tensor& tensor) { return shape_text(tensor.sizes()); }

inline std::string device_text(const Tensor& tensor) {
  const torch::headeronly::DeviceType type = tensor.device().type();
  const std::string name = type == torch::headeronly::DeviceType::CPU    ? "cpu"
                           : type == torch::headeronly::DeviceType::CUDA ? "cuda"
                                                                         : "another device";
  return tensor.device().has_index() ? name + ":" + std::to_string(tensor.device().index()) : name;
}

template <typename Sizes>
bool has_shape(const Tensor& tensor, const Sizes& sizes) {
  const auto own = tensor.sizes();
  return std::equal(own.begin(), own.end(), sizes.begin(), sizes.end());
}

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: return DType::kFloat64;
  }
}

inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A new contiguous tensor on `like`'s device; without the dispatcher, which would take as long as a small kernel.
template <typename Sizes>
Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto dtype_number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle created = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                         dtype_number, device_type, device_index, &created));
  return Tensor(created);
}

inline Operand operand(const Tensor& tensor) { return {tensor.const_data_ptr(), dtype_of(tensor.scalar_type())}; }
inline Operand operand(const OptionalTensor& tensor) { return tensor ? operand(*tensor) : Operand{}; }
inline Result result(const Tensor& tensor) { return {tensor.mutable_data_ptr(), dtype_of(tensor.scalar_type())}; }

inline bool is_wide(ScalarType type) { return type == ScalarType::Double; }
inline ScalarType hidden_dtype(const Tensor& x) {
  return is_wide(x.scalar_type()) ? x.scalar_type() : ScalarType::Float;
}

// float32 with one low dtype gives float32; the checks leave no other mix.
inline ScalarType promoted(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

// The tensors and settings that both directions share, in the order of the schemas.
struct AdapterArguments {
  Tensor x, down;
  OptionalTensor down_bias;
  Tensor up;
  OptionalTensor up_bias, scale, seed;
  double scale_value;
  int64_t activation;
  double dropout, dropout_out, drop_path;
  ScalarType compute;
  bool allow_tf32;

  int64_t dim() const { return x.size(x.dim() - 1); }
  int64_t rank() const { return down.size(0); }
  int64_t rows() const { return x.numel() / dim(); }
};

struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};

inline void check_shape(NamedTensor named, std::initializer_list<int64_t> expected, const char* meaning) {
  VA_CHECK(has_shape(named.tensor, expected), "adapter: ", named.name, " has shape ", shape_text(named.tensor),
           "; expected ", meaning, " = ", shape_text(expected));
}

// Every tensor on x's device, and all float64 or a mix of float32 and one low dtype.
inline void check_devices_and_dtypes(const std::vector<NamedTensor>& tensors, ScalarType compute) {
  const Tensor& x = tensors.front().tensor;
  ScalarType low = ScalarType::Float;
  auto check_dtype = [&](const char* name, ScalarType type) {
    const bool known = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                       type == ScalarType::Double;
    VA_CHECK(known, "adapter: ", name, " is ", text(type), "; float32, bfloat16, float16 and float64 are accepted");
    VA_CHECK(is_wide(type) == is_wide(x.scalar_type()), "adapter: ", name, " is ", text(type), " and x is ",
             text(x.scalar_type()), "; float64 cannot be mixed with another dtype");
    if (is_wide(type) || type == ScalarType::Float) return;
    VA_CHECK(low == ScalarType::Float || low == type, "adapter: ", name, " is ", text(type),
             " beside a tensor or compute dtype of ", text(low), "; float32 mixes with one of them only");
    low = type;
  };
  for (const NamedTensor& each : tensors) {
    VA_CHECK(each.tensor.device() == x.device(), "adapter: ", each.name, " is on ", device_text(each.tensor),
             " and x on ", device_text(x), "; all tensors of a call must be on one device");
    check_dtype(each.name, each.tensor.scalar_type());
  }
  check_dtype("the compute dtype", compute);
}

inline void check_probability(const char* name, double p) {
  VA_CHECK(p >= 0 && p < 1, "adapter: ", name, " is ", p, "; it must be a probability in [0, 1)");
}

// `others` are tensors beside the shared ones, whose shapes the caller checks.
inline void check(const AdapterArguments& a, const std::vector<NamedTensor>& others) {
  VA_CHECK(a.x.dim() >= 1 && a.x.size(a.x.dim() - 1) >= 1, "adapter: x has shape ", shape_text(a.x),
           "; expected (..., dim) with dim of at least 1");
  VA_CHECK(a.down.dim() == 2, "adapter: down has shape ", shape_text(a.down), "; expected (rank, dim)");
  check_shape({"down", a.down}, {a.rank(), a.dim()}, "(rank, dim)");
  check_shape({"up", a.up}, {a.dim(), a.rank()}, "(dim, rank)");
  std::vector<NamedTensor> tensors{{"x", a.x}, {"down", a.down}, {"up", a.up}};
  if (a.down_bias) {
    check_shape({"down_bias", *a.down_bias}, {a.rank()}, "(rank,)");
    tensors.push_back({"down_bias", *a.down_bias});
  }
  if (a.up_bias) {
    check_shape({"up_bias", *a.up_bias}, {a.dim()}, "(dim,)");
    tensors.push_back({"up_bias", *a.up_bias});
  }
  if (a.scale) {
    const bool fits = a.scale->dim() == 1 && (a.scale->size(0) == 1 || a.scale->size(0) == a.dim());
    VA_CHECK(fits, "adapter: scale has shape ", shape_text(*a.scale), "; expected (1,) or (dim,) = (", a.dim(), ",)");
    tensors.push_back({"scale", *a.scale});
  }
  for (const NamedTensor& each : others) tensors.push_back(each);
  check_devices_and_dtypes(tensors, a.compute);
  VA_CHECK(a.activation >= 0 && a.activation < kActivations, "adapter: there is no activation number ", a.activation);
  check_probability("dropout", a.dropout);
  check_probability("dropout_out", a.dropout_out);
  check_probability("drop_path", a.drop_path);
  if (a.dropout > 0 || a.dropout_out > 0 || a.drop_path > 0) {
    VA_CHECK(a.seed, "adapter: dropout needs a seed");
    const bool fits = a.seed->dim() == 1 && a.seed->size(0) == 1 && a.seed->scalar_type() == ScalarType::Long;
    VA_CHECK(fits && a.seed->device() == a.x.device(), "adapter: seed is ", text(a.seed->scalar_type()), " of shape ",
             shape_text(*a.seed), "; expected int64 of shape (1,) on x's device");
  }
}

// Fills what both directions share; `a` must outlive the problem.
inline void describe(const AdapterArguments& a, AdapterProblem& p) {
  p.rows = a.rows();
  p.dim = a.dim();
  p.rank = a.rank();
  const int64_t samples = a.x.dim() > 1 ? a.x.size(0) : 1;
  p.rows_per_sample = samples > 0 ? p.rows / samples : 1;
  p.x = operand(a.x);
  p.down = operand(a.down);
  p.up = operand(a.up);
  p.up_bias = operand(a.up_bias);
  p.scale = operand(a.scale);
  p.scale_is_channel = a.scale && a.scale->size(0) == a.dim();
  p.scale_value = a.scale_value;
  p.activation = Activation(a.activation);
  const int64_t* seed = a.seed ? static_cast<const int64_t*>(a.seed->const_data_ptr()) : nullptr;
  p.dropout = {seed, Stream::kDropout, a.dropout};
  p.dropout_out = {seed, Stream::kDropoutOut, a.dropout_out};
  p.drop_path = {seed, Stream::kDropPath, a.drop_path};
  p.compute = dtype_of(a.compute);
  p.allow_tf32 = a.allow_tf32;
}

inline AdapterArguments packed(AdapterArguments a) {
  a.x = packed(a.x);
  a.down = packed(a.down);
  a.up = packed(a.up);
  for (OptionalTensor* each : {&a.down_bias, &a.up_bias, &a.scale}) {
    if (*each) *each = packed(**each);
  }
  return a;
}

// (y, hidden): Backend::forward(x, problem) runs a problem whose tensors are contiguous and checked.
template <typename Backend>
std::tuple<Tensor, Tensor> adapter_forward(Tensor x, OptionalTensor residual, Tensor down, OptionalTensor down_bias,
                                           Tensor up, OptionalTensor up_bias, OptionalTensor scale, OptionalTensor seed,
                                           double scale_value, int64_t activation, double dropout, double dropout_out,
                                           double drop_path, ScalarType compute, bool allow_tf32, bool save_hidden) {
  AdapterArguments a{x,           down,       down_bias, up,          up_bias,   scale,   seed,
                     scale_value, activation, dropout,   dropout_out, drop_path, compute, allow_tf32};
  std::vector<NamedTensor> others;
  if (residual) {
    VA_CHECK(has_shape(*residual, x.sizes()), "adapter: residual has shape ", shape_text(*residual), "; expected x's, ",
             shape_text(x));
    others.push_back({"residual", *residual});
  }
  check(a, others);
  a = packed(a);
  const Tensor base = residual ? packed(*residual) : a.x;
  Tensor y = empty(a.x, a.x.sizes(), promoted(a.x.scalar_type(), base.scalar_type()));
  std::vector<int64_t> hidden_shape{0};
  if (save_hidden) {
    hidden_shape.assign(x.sizes().begin(), x.sizes().end());
    hidden_shape.back() = a.rank();
  }
  Tensor hidden = empty(a.x, hidden_shape, hidden_dtype(x));

  AdapterForward problem;
  describe(a, problem);
  problem.down_bias = operand(a.down_bias);
  problem.residual = operand(base);
  problem.y = result(y);
  problem.hidden = save_hidden ? hidden.mutable_data_ptr() : nullptr;
  if (problem.rows > 0) Backend::forward(a.x, problem);
  return {y, hidden};
}

// The gradients of x, down, down_bias, up, up_bias, scale; empty where `needs` lacks their bit (x is the lowest).
template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter_backward(
    Tensor grad, Tensor x, Tensor hidden, Tensor down, OptionalTensor down_bias, Tensor up, OptionalTensor up_bias,
    OptionalTensor scale, OptionalTensor seed, bool residual_is_x, double scale_value, int64_t activation,
    double dropout, double dropout_out, double drop_path, ScalarType compute, bool allow_tf32, int64_t needs) {
  AdapterArguments a{x,           down,       down_bias, up,          up_bias,   scale,   seed,
                     scale_value, activation, dropout,   dropout_out, drop_path, compute, allow_tf32};
  check(a, {{"grad", grad}, {"hidden", hidden}});
  VA_CHECK(
      grad.numel() == x.numel() && hidden.numel() == a.rows() * a.rank() && hidden.scalar_type() == hidden_dtype(x),
      "adapter: grad has shape ", shape_text(grad), " and hidden ", text(hidden.scalar_type()), " ", shape_text(hidden),
      "; expected those of the forward pass");
  const ScalarType wide = is_wide(x.scalar_type()) ? x.scalar_type() : ScalarType::Float;
  VA_CHECK(grad.scalar_type() == x.scalar_type() || (grad.scalar_type() == wide && !residual_is_x), "adapter: grad is ",
           text(grad.scalar_type()), " and x ", text(x.scalar_type()), "; expected that of the forward pass' output");
  a = packed(a);
  const Tensor g = packed(grad), saved = packed(hidden);

  AdapterBackward problem;
  describe(a, problem);
  problem.grad = operand(g);
  problem.hidden = saved.const_data_ptr();
  problem.residual_is_x = residual_is_x;
  auto gradient = [&](int bit, const OptionalTensor& of, Result& slot) {
    if (!of || !(needs >> bit & 1)) return empty(a.x, std::vector<int64_t>{0}, a.x.scalar_type());
    Tensor out = empty(*of, of->sizes(), of->scalar_type());
    slot = result(out);
    return out;
  };
  std::tuple grads{gradient(0, a.x, problem.x_grad),
                   gradient(1, a.down, problem.down_grad),
                   gradient(2, a.down_bias, problem.down_bias_grad),
                   gradient(3, a.up, problem.up_grad),
                   gradient(4, a.up_bias, problem.up_bias_grad),
                   gradient(5, a.scale, problem.scale_grad)};
  Backend::backward(a.x, problem);
  return grads;
}

}  // namespace vitadapter::bind
