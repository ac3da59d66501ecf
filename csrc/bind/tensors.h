// What does the binding of every op need? Tensors in words, as operands and results, new ones, and the checks that ops
// share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/dtype.h"

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

struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};

inline void check_shape(const char* op, NamedTensor named, std::initializer_list<int64_t> expected,
                        const char* meaning) {
  VA_CHECK(has_shape(named.tensor, expected), op, ": ", named.name, " has shape ", shape_text(named.tensor),
           "; expected ", meaning, " = ", shape_text(expected));
}

// Every tensor on the first one's device, and all float64 or a mix of float32 and one low dtype.
inline void check_devices_and_dtypes(const char* op, const std::vector<NamedTensor>& tensors, ScalarType compute) {
  const char* const first = tensors.front().name;
  const Tensor& x = tensors.front().tensor;
  ScalarType low = ScalarType::Float;
  auto check_dtype = [&](const char* name, ScalarType type) {
    const bool known = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                       type == ScalarType::Double;
    VA_CHECK(known, op, ": ", name, " is ", text(type), "; float32, bfloat16, float16 and float64 are accepted");
    VA_CHECK(is_wide(type) == is_wide(x.scalar_type()), op, ": ", name, " is ", text(type), " and ", first, " is ",
             text(x.scalar_type()), "; float64 cannot be mixed with another dtype");
    if (is_wide(type) || type == ScalarType::Float) return;
    VA_CHECK(low == ScalarType::Float || low == type, op, ": ", name, " is ", text(type),
             " beside a tensor or compute dtype of ", text(low), "; float32 mixes with one of them only");
    low = type;
  };
  for (const NamedTensor& each : tensors) {
    VA_CHECK(each.tensor.device() == x.device(), op, ": ", each.name, " is on ", device_text(each.tensor), " and ",
             first, " on ", device_text(x), "; all tensors of a call must be on one device");
    check_dtype(each.name, each.tensor.scalar_type());
  }
  check_dtype("the compute dtype", compute);
}

// A tensor beside the others, where it is there.
inline void check_optional(const char* op, const char* name, const OptionalTensor& tensor,
                           std::initializer_list<int64_t> expected, const char* meaning,
                           std::vector<NamedTensor>& tensors) {
  if (!tensor) return;
  check_shape(op, {name, *tensor}, expected, meaning);
  tensors.push_back({name, *tensor});
}

inline void check_rows(const char* op, const Tensor& x) {
  VA_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, op, ": x has shape ", shape_text(x),
           "; expected (..., dim) with dim of at least 1");
}

// That a backward pass gets what the forward pass made; `residual_is_x`: whether y has x's dtype.
inline void check_grad_and_hidden(const char* op, const Tensor& grad, const Tensor& hidden, const Tensor& x,
                                  int64_t hidden_numel, bool residual_is_x) {
  VA_CHECK(grad.numel() == x.numel() && hidden.numel() == hidden_numel && hidden.scalar_type() == hidden_dtype(x), op,
           ": grad has shape ", shape_text(grad), " and hidden ", text(hidden.scalar_type()), " ", shape_text(hidden),
           "; expected those of the forward pass");
  VA_CHECK(grad.scalar_type() == x.scalar_type() || (grad.scalar_type() == hidden_dtype(x) && !residual_is_x), op,
           ": grad is ", text(grad.scalar_type()), " and x ", text(x.scalar_type()),
           "; expected that of the forward pass' output");
}

inline void check_probability(const char* op, const char* name, double p) {
  VA_CHECK(p >= 0 && p < 1, op, ": ", name, " is ", p, "; it must be a probability in [0, 1)");
}

inline void check_seed(const char* op, const OptionalTensor& seed, const Tensor& x) {
  VA_CHECK(seed, op, ": dropout needs a seed");
  const bool fits = seed->dim() == 1 && seed->size(0) == 1 && seed->scalar_type() == ScalarType::Long;
  VA_CHECK(fits && seed->device() == x.device(), op, ": seed is ", text(seed->scalar_type()), " of shape ",
           shape_text(*seed), "; expected int64 of shape (1,) on x's device");
}

inline const int64_t* seed_data(const OptionalTensor& seed) {
  return seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr;
}

inline OptionalTensor packed(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(packed(*tensor)) : std::nullopt;
}

// Room for the hidden layer of all of x's rows; of no rows where it is not kept.
inline Tensor empty_hidden(const Tensor& x, int64_t rank, bool save) {
  std::vector<int64_t> shape{0};
  if (save) {
    shape.assign(x.sizes().begin(), x.sizes().end());
    shape.back() = rank;
  }
  return empty(x, shape, hidden_dtype(x));
}

// Room for the gradient of a tensor, named in `slot`; empty where the tensor is not there or its bit of `needs` is 0.
inline Tensor empty_gradient(const Tensor& x, const OptionalTensor& of, int64_t needs, int bit, Result& slot) {
  if (!of || !(needs >> bit & 1)) return empty(x, std::vector<int64_t>{0}, x.scalar_type());
  Tensor out = empty(*of, of->sizes(), of->scalar_type());
  slot = result(out);
  return out;
}

}  // namespace vitadapter::bind
