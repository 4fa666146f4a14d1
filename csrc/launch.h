// From a call of an operator to tasks: checks that name the argument, then plain pointers. No kernel runs on bad input.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "task.h"

namespace deslo {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using ScalarType = torch::headeronly::ScalarType;

// Raises ValueError in Python.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message << "deslo: ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline std::string shown(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::ostringstream text;
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "[") << sizes[i];
  return sizes.empty() ? "[]" : text.str() + "]";
}

inline std::string at(const char* name, size_t index) { return std::string(name) + "[" + std::to_string(index) + "]"; }

// The arguments of one call. `u` is momentum-major: u[j * x.size() + i] is momentum j of parameter i.
struct Call {
  Hyper hyper;
  const Tensors *x, *g, *u, *v, *copy;  // v is null for sgdm; copy may be empty
  const std::optional<Tensor> *grad_scale, *found_inf;
};

inline void set_momenta(Hyper& hyper, const std::vector<double>& betas, const std::vector<double>& weights) {
  if (betas.empty() || betas.size() > kMaxMomenta) {
    refuse("betas: expected 1 to ", kMaxMomenta, " momenta, got ", betas.size());
  }
  if (weights.size() != betas.size()) {
    refuse("weights: expected ", betas.size(), " as there are betas, got ", weights.size());
  }
  hyper.momenta = int(betas.size());
  std::copy(betas.begin(), betas.end(), hyper.beta);
  std::copy(weights.begin(), weights.end(), hyper.weight);
}

const char* const kNames[] = {"float32", "float64", "bfloat16", "float16"};  // by Dtype

inline Dtype dtype_of(const Tensor& tensor, const std::string& name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: refuse(name, ": expected float32, float64, bfloat16 or float16, got another dtype");
  }
}

inline bool same(torch::headeronly::IntHeaderOnlyArrayRef a, torch::headeronly::IntHeaderOnlyArrayRef b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

// Whether the elements fill one stretch of memory, in whatever order of dimensions.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether equal offsets from the first element mean equal indices. Both tensors are dense and of one shape.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  if (same(a.strides(), b.strides()) || (a.is_contiguous() && b.is_contiguous())) return true;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Builds the tasks of one call: one for float32 states, one for float64 states.
class Launch {
 public:
  explicit Launch(const Call& call) : call_(call), device_(first(call).get_device_index()), cuda_(first(call).is_cuda()) {
    const size_t count = call.x->size();
    expect_length("g", call.g->size(), count);
    if (call.v) expect_length("v", call.v->size(), count);
    expect_length("u", call.u->size(), count * call.hyper.momenta);
    if (!call.copy->empty()) expect_length("copy", call.copy->size(), count);
    grad_scale_ = scalar("grad_scale", *call.grad_scale);
    found_inf_ = scalar("found_inf", *call.found_inf);

    hyper_ = call.hyper;
    if (hyper_.rule == Rule::kAdopt && hyper_.t == 0) {
      hyper_.rule = Rule::kAdoptStart;
      hyper_.momenta = 0;
    }
    for (size_t i = 0; i < count; ++i) {
      const Dtype state = dtype_of((*call.u)[i], at("u", i));
      if (state == Dtype::kFloat32) {
        add(i, single_);
      } else if (state == Dtype::kFloat64) {
        add(i, double_);
      } else {
        refuse(at("u", i), ": expected float32 or float64, got ", kNames[int(state)], "; momenta stall in 16 bits");
      }
    }
    refuse_overlap();
  }

  // Calls run(task) for every task that has an element.
  template <typename Run>
  void each(Run run) const {
    if (single_.blocks) run(task(single_));
    if (double_.blocks) run(task(double_));
  }

  int32_t device() const { return device_; }

 private:
  template <typename T>
  struct Table {
    std::vector<Slot<T>> slots;
    std::vector<T*> u;
    int64_t blocks = 0;
  };

  struct Stretch {
    const char *begin, *end;
    const char* name;
    size_t index;
    bool written;
  };

  static const Tensor& first(const Call& call) {
    if (call.x->empty()) refuse("x: expected one tensor or more, got an empty list");
    return call.x->front();
  }

  static void expect_length(const char* name, size_t got, size_t expected) {
    if (got != expected) refuse(name, ": expected ", expected, " tensors, got ", got);
  }

  void expect_device(const Tensor& tensor, const std::string& name) const {
    if (tensor.is_cuda() != cuda_ || (!cuda_ && !tensor.is_cpu()) || tensor.get_device_index() != device_) {
      refuse(name, ": expected the device of x[0], got another");
    }
  }

  const float* scalar(const char* name, const std::optional<Tensor>& tensor) const {
    if (!tensor) return nullptr;
    expect_device(*tensor, name);
    if (tensor->scalar_type() != ScalarType::Float || tensor->numel() != 1) {
      refuse(name, ": expected one float32 number, got shape ", shown(tensor->sizes()));
    }
    return static_cast<const float*>(tensor->const_data_ptr());
  }

  // Checks one tensor of parameter i and returns where it lies. `element` is in bytes.
  void* checked(const char* name, size_t index, const Tensor& tensor, size_t i, size_t element, bool written) {
    const Tensor& x = (*call_.x)[i];
    expect_device(tensor, at(name, index));
    if (!same(tensor.sizes(), x.sizes())) {
      refuse(at(name, index), ": expected shape ", shown(x.sizes()), " of x[", i, "], got ", shown(tensor.sizes()));
    }
    if (!is_dense(tensor)) refuse(at(name, index), ": expected a contiguous (or densely strided) tensor");
    if (!same_layout(tensor, x)) {
      refuse(at(name, index), ": expected strides ", shown(x.strides()), " of x[", i, "], got ", shown(tensor.strides()));
    }
    char* const data = static_cast<char*>(tensor.mutable_data_ptr());
    const int64_t numel = tensor.numel();
    if (numel) stretches_.push_back({data, data + numel * element, name, index, written});
    return data;
  }

  template <typename T>
  Dtype parameter_type(const Tensor& tensor, const std::string& name) const {
    const Dtype type = dtype_of(tensor, name);
    if ((type == Dtype::kFloat64) != (kDtype<T> == Dtype::kFloat64)) {
      refuse(name, kDtype<T> == Dtype::kFloat64 ? ": expected float64 with float64 momenta, got "
                                                : ": expected float32, bfloat16 or float16 with float32 momenta, got ",
             kNames[int(type)]);
    }
    return type;
  }

  template <typename T>
  T* state(const char* name, size_t index, const Tensor& tensor, size_t i) {
    const Dtype type = dtype_of(tensor, at(name, index));
    if (type != kDtype<T>) {
      refuse(at(name, index), ": expected ", kNames[int(kDtype<T>)], " as u[", i, "] is, got ", kNames[int(type)]);
    }
    return static_cast<T*>(checked(name, index, tensor, i, sizeof(T), true));
  }

  static size_t width(Dtype type) {
    return type == Dtype::kFloat64 ? 8 : type == Dtype::kFloat32 ? 4 : 2;
  }

  template <typename T>
  void add(size_t i, Table<T>& table) {
    const size_t count = call_.x->size();
    Slot<T> slot{};
    slot.x_type = parameter_type<T>((*call_.x)[i], at("x", i));
    slot.x = checked("x", i, (*call_.x)[i], i, width(slot.x_type), true);
    slot.g_type = parameter_type<T>((*call_.g)[i], at("g", i));
    slot.g = checked("g", i, (*call_.g)[i], i, width(slot.g_type), false);
    if (call_.v) slot.v = state<T>("v", i, (*call_.v)[i], i);
    if (!call_.copy->empty()) {
      slot.copy_type = parameter_type<T>((*call_.copy)[i], at("copy", i));
      slot.copy = checked("copy", i, (*call_.copy)[i], i, width(slot.copy_type), true);
    }
    std::vector<T*> momenta;
    for (int j = 0; j < call_.hyper.momenta; ++j) {
      const size_t index = j * count + i;
      momenta.push_back(state<T>("u", index, (*call_.u)[index], i));
    }
    slot.numel = (*call_.x)[i].numel();
    if (slot.numel == 0) return;
    slot.first_block = table.blocks;
    table.blocks += (slot.numel + kBlock - 1) / kBlock;
    table.slots.push_back(slot);
    table.u.insert(table.u.end(), momenta.begin(), momenta.begin() + hyper_.momenta);
  }

  void refuse_overlap() {
    const auto before = [](const Stretch& a, const Stretch& b) { return a.begin < b.begin; };
    std::sort(stretches_.begin(), stretches_.end(), before);
    const Stretch* reaching = nullptr;  // of those so far, the one that ends last
    const Stretch* writing = nullptr;   // of the written ones, the one that ends last
    for (const Stretch& next : stretches_) {
      const Stretch* const other = next.written ? reaching : writing;
      if (other && other->end > next.begin) {
        refuse(at(next.name, next.index), ": expected memory of its own, but it overlaps ", at(other->name, other->index));
      }
      if (!reaching || next.end > reaching->end) reaching = &next;
      if (next.written && (!writing || next.end > writing->end)) writing = &next;
    }
  }

  template <typename T>
  Task<T> task(const Table<T>& table) const {
    return {hyper_, table.slots.data(), table.u.data(), int64_t(table.slots.size()), table.blocks, grad_scale_, found_inf_};
  }

  const Call& call_;
  const int32_t device_;
  const bool cuda_;
  Hyper hyper_;
  Table<float> single_;
  Table<double> double_;
  const float* grad_scale_ = nullptr;
  const float* found_inf_ = nullptr;
  std::vector<Stretch> stretches_;
};

}  // namespace deslo
