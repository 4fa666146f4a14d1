// From a call of a rule to tasks: checks that name the argument, then plain pointers. No kernel runs on bad input.
#pragma once

#include <optional>

#include "../update.h"
#include "argument_checks.h"

namespace deslo {

// The arguments of one call. `u` is momentum-major: u[j * x.size() + i] is momentum j of parameter i.
struct Call {
  Hyper hyper;
  const Tensors *x, *g, *u, *v, *copy;  // v is null for sgdm; copy may be empty
  const std::optional<Tensor> *grad_scale, *found_inf;
  const std::optional<Tensor> *t, *lr;  // in place of those of hyper
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

// Builds the tasks of one call: one for each dtype of states. Where the host may read tensors, it reads t and lr.
class Launch {
 public:
  Launch(const Call& call, bool host_reads) : call_(call), device_(first(call).get_device_index()), cuda_(first(call).is_cuda()) {
    const size_t count = call.x->size();
    expect_length("g", call.g->size(), count);
    if (call.v) expect_length("v", call.v->size(), count);
    expect_length("u", call.u->size(), count * call.hyper.momenta);
    if (!call.copy->empty()) expect_length("copy", call.copy->size(), count);
    grad_scale_ = number<float>("grad_scale", *call.grad_scale, ScalarType::Float, "float32");
    found_inf_ = number<float>("found_inf", *call.found_inf, ScalarType::Float, "float32");
    t_ = number<int64_t>("t", *call.t, ScalarType::Long, "int64");
    lr_ = number<double>("lr", *call.lr, ScalarType::Double, "float64");

    hyper_ = call.hyper;
    if (host_reads) {
      if (t_) hyper_.t = *std::exchange(t_, nullptr);
      if (lr_) hyper_.lr = *std::exchange(lr_, nullptr);
    }
    if (hyper_.rule == Rule::kAdopt && !t_ && hyper_.t == 0) {
      hyper_.rule = Rule::kAdoptStart;
      hyper_.momenta = 0;
    }
    const size_t tensors = count * (4 + call.hyper.momenta);
    stretches_.reserve(tensors);
    single_.slots.reserve(count);
    single_.u.reserve(count * call.hyper.momenta);
    for (size_t i = 0; i < count; ++i) {
      const Dtype state = dtype_of((*call.u)[i], at("u", i));
      switch (state) {
        case Dtype::kFloat32: add(i, single_); break;
        case Dtype::kFloat64: add(i, double_); break;
        case Dtype::kBFloat16: add(i, brief_); break;
        case Dtype::kFloat16:
          refuse(at("u", i), ": expected float32, float64 or bfloat16, got float16; squares of gradients vanish in it");
      }
    }
    refuse_overlap(stretches_);
  }

  // Calls run(task) for every task that has an element.
  template <typename Run>
  void each(Run run) const {
    if (single_.blocks) run(task(single_));
    if (double_.blocks) run(task(double_));
    if (brief_.blocks) run(task(brief_));
  }

 private:
  template <typename S>
  struct Table {
    std::vector<Slot<S>> slots;
    std::vector<S*> u;
    int64_t blocks = 0;
  };

  static const Tensor& first(const Call& call) {
    if (call.x->empty()) refuse("x: expected one tensor or more, got an empty list");
    return call.x->front();
  }

  static void expect_length(const char* name, size_t got, size_t expected) {
    if (got != expected) refuse(name, ": expected ", expected, " tensors, got ", got);
  }

  void expect_device(const Tensor& tensor, const Name& name) const {
    if (tensor.is_cuda() != cuda_ || (!cuda_ && !tensor.is_cpu()) || tensor.get_device_index() != device_) {
      refuse(name, ": expected the device of x[0], got another");
    }
  }

  template <typename T>
  const T* number(const char* name, const std::optional<Tensor>& tensor, ScalarType type, const char* type_name) const {
    if (!tensor) return nullptr;
    expect_device(*tensor, {name});
    if (tensor->scalar_type() != type || tensor->numel() != 1) {
      refuse(name, ": expected one ", type_name, " number, got shape ", shown(tensor->sizes()));
    }
    return static_cast<const T*>(tensor->const_data_ptr());
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

  template <typename S>
  Dtype parameter_type(const Tensor& tensor, const Name& name) const {
    const Dtype type = dtype_of(tensor, name);
    if ((type == Dtype::kFloat64) != (kDtype<S> == Dtype::kFloat64)) {
      refuse(name, kDtype<S> == Dtype::kFloat64 ? ": expected float64" : ": expected float32, bfloat16 or float16", " with ",
             kNames[int(kDtype<S>)], " momenta, got ", kNames[int(type)]);
    }
    return type;
  }

  template <typename S>
  S* state(const char* name, size_t index, const Tensor& tensor, size_t i) {
    const Dtype type = dtype_of(tensor, at(name, index));
    if (type != kDtype<S>) {
      refuse(at(name, index), ": expected ", kNames[int(kDtype<S>)], " as u[", i, "] is, got ", kNames[int(type)]);
    }
    return static_cast<S*>(checked(name, index, tensor, i, sizeof(S), true));
  }

  template <typename S>
  void add(size_t i, Table<S>& table) {
    const size_t count = call_.x->size();
    Slot<S> slot{};
    slot.x_type = parameter_type<S>((*call_.x)[i], at("x", i));
    slot.x = checked("x", i, (*call_.x)[i], i, width(slot.x_type), true);
    slot.g_type = parameter_type<S>((*call_.g)[i], at("g", i));
    slot.g = checked("g", i, (*call_.g)[i], i, width(slot.g_type), false);
    if (call_.v) slot.v = state<S>("v", i, (*call_.v)[i], i);
    if (!call_.copy->empty()) {
      slot.copy_type = parameter_type<S>((*call_.copy)[i], at("copy", i));
      slot.copy = checked("copy", i, (*call_.copy)[i], i, width(slot.copy_type), true);
    }
    S* momenta[kMaxMomenta];
    for (int j = 0; j < call_.hyper.momenta; ++j) {
      const size_t index = j * count + i;
      momenta[j] = state<S>("u", index, (*call_.u)[index], i);
    }
    slot.numel = (*call_.x)[i].numel();
    if (slot.numel == 0) return;
    slot.first_block = table.blocks;
    table.blocks += (slot.numel + kBlock - 1) / kBlock;
    table.slots.push_back(slot);
    table.u.insert(table.u.end(), momenta, momenta + hyper_.momenta);
  }

  template <typename S>
  Task<S> task(const Table<S>& table) const {
    return {recipe<S>(hyper_), hyper_, table.slots.data(), table.u.data(), int64_t(table.slots.size()), table.blocks,
            grad_scale_, found_inf_, t_, lr_};
  }

  const Call& call_;
  const int32_t device_;
  const bool cuda_;
  Hyper hyper_;
  Table<float> single_;
  Table<double> double_;
  Table<BFloat16> brief_;
  const float* grad_scale_ = nullptr;
  const float* found_inf_ = nullptr;
  const int64_t* t_ = nullptr;
  const double* lr_ = nullptr;
  std::vector<Stretch> stretches_;
};

}  // namespace deslo
