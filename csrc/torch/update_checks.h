// Checks the arguments of an update operator and makes the tasks of its kernels. No kernel runs on bad input.
#pragma once

#include <optional>

#include "../update.h"
#include "argument_checks.h"

namespace deslo {

// The arguments of one call. `u` is momentum-major: u[j * x.size() + i] is momentum j of parameter i.
struct UpdateArgs {
  Hyperparameters hyper;
  const Tensors *x, *g, *u, *v, *copy;  // v is null for sgdm; copy may be empty
  const std::optional<Tensor>* grad_scale;
  const std::optional<Tensor>* found_inf;
  const std::optional<Tensor>* t;   // in place of that of hyper
  const std::optional<Tensor>* lr;  // likewise
};

inline void set_momenta(Hyperparameters& hyper, const std::vector<double>& betas, const std::vector<double>& weights) {
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
class CheckedUpdate {
 public:
  CheckedUpdate(const UpdateArgs& args, bool host_reads)
      : args_(args), device_(first_parameter(args).get_device_index()), cuda_(first_parameter(args).is_cuda()) {
    const size_t count = args.x->size();
    expect_length("g", args.g->size(), count);
    if (args.v) expect_length("v", args.v->size(), count);
    expect_length("u", args.u->size(), count * args.hyper.momenta);
    if (!args.copy->empty()) expect_length("copy", args.copy->size(), count);
    grad_scale_ = check_scalar<float>("grad_scale", *args.grad_scale, ScalarType::Float, "float32");
    found_inf_ = check_scalar<float>("found_inf", *args.found_inf, ScalarType::Float, "float32");
    t_ = check_scalar<int64_t>("t", *args.t, ScalarType::Long, "int64");
    lr_ = check_scalar<double>("lr", *args.lr, ScalarType::Double, "float64");

    hyper_ = args.hyper;
    if (host_reads) {
      if (t_) hyper_.t = *std::exchange(t_, nullptr);
      if (lr_) hyper_.lr = *std::exchange(lr_, nullptr);
    }
    if (hyper_.rule == Rule::kAdopt && !t_ && hyper_.t == 0) {
      hyper_.rule = Rule::kAdoptStart;
      hyper_.momenta = 0;
    }
    const size_t tensors = count * (4 + args.hyper.momenta);
    ranges_.reserve(tensors);
    f32_.slots.reserve(count);
    f32_.u.reserve(count * args.hyper.momenta);
    for (size_t i = 0; i < count; ++i) {
      const Dtype state = dtype_of((*args.u)[i], name_of("u", i));
      switch (state) {
        case Dtype::kFloat32: add_parameter(i, f32_); break;
        case Dtype::kFloat64: add_parameter(i, f64_); break;
        case Dtype::kBFloat16: add_parameter(i, bf16_); break;
        case Dtype::kFloat16:
          refuse(name_of("u", i),
                 ": expected float32, float64 or bfloat16, got float16; squares of gradients vanish in it");
      }
    }
    refuse_overlap(ranges_);
  }

  // Calls run(task) for every task that has an element.
  template <typename Run>
  void for_each_task(Run run) const {
    if (f32_.blocks) run(make_task(f32_));
    if (f64_.blocks) run(make_task(f64_));
    if (bf16_.blocks) run(make_task(bf16_));
  }

 private:
  template <typename S>
  struct Table {
    std::vector<ParamSlot<S>> slots;
    std::vector<S*> u;
    int64_t blocks = 0;
  };

  static const Tensor& first_parameter(const UpdateArgs& args) {
    if (args.x->empty()) refuse("x: expected one tensor or more, got an empty list");
    return args.x->front();
  }

  static void expect_length(const char* name, size_t got, size_t expected) {
    if (got != expected) refuse(name, ": expected ", expected, " tensors, got ", got);
  }

  void expect_device(const Tensor& tensor, const ArgumentName& name) const {
    if (tensor.is_cuda() != cuda_ || (!cuda_ && !tensor.is_cpu()) || tensor.get_device_index() != device_) {
      refuse(name, ": expected the device of x[0], got another");
    }
  }

  template <typename T>
  const T* check_scalar(const char* name, const std::optional<Tensor>& tensor, ScalarType type,
                        const char* type_name) const {
    if (!tensor) return nullptr;
    expect_device(*tensor, {name});
    if (tensor->scalar_type() != type || tensor->numel() != 1) {
      refuse(name, ": expected one ", type_name, " number, got shape ", format_shape(tensor->sizes()));
    }
    return static_cast<const T*>(tensor->const_data_ptr());
  }

  // Checks one tensor of parameter i and returns where it lies. `element` is in bytes.
  void* check_tensor(const char* name, size_t index, const Tensor& tensor, size_t i, size_t element, bool written) {
    const Tensor& x = (*args_.x)[i];
    expect_device(tensor, name_of(name, index));
    if (!are_equal(tensor.sizes(), x.sizes())) {
      refuse(name_of(name, index), ": expected shape ", format_shape(x.sizes()), " of x[", i, "], got ",
             format_shape(tensor.sizes()));
    }
    if (!is_dense(tensor)) refuse(name_of(name, index), ": expected a contiguous (or densely strided) tensor");
    if (!same_layout(tensor, x)) {
      refuse(name_of(name, index), ": expected strides ", format_shape(x.strides()), " of x[", i, "], got ",
             format_shape(tensor.strides()));
    }
    char* const data = static_cast<char*>(tensor.mutable_data_ptr());
    const int64_t numel = tensor.numel();
    if (numel) ranges_.push_back({data, data + numel * element, name, index, written});
    return data;
  }

  template <typename S>
  Dtype check_parameter_type(const Tensor& tensor, const ArgumentName& name) const {
    const Dtype type = dtype_of(tensor, name);
    if ((type == Dtype::kFloat64) != (kDtype<S> == Dtype::kFloat64)) {
      refuse(name, kDtype<S> == Dtype::kFloat64 ? ": expected float64" : ": expected float32, bfloat16 or float16",
             " with ", kDtypeNames[int(kDtype<S>)], " momenta, got ", kDtypeNames[int(type)]);
    }
    return type;
  }

  template <typename S>
  S* check_state(const char* name, size_t index, const Tensor& tensor, size_t i) {
    const Dtype type = dtype_of(tensor, name_of(name, index));
    if (type != kDtype<S>) {
      refuse(name_of(name, index), ": expected ", kDtypeNames[int(kDtype<S>)], " as u[", i, "] is, got ",
             kDtypeNames[int(type)]);
    }
    return static_cast<S*>(check_tensor(name, index, tensor, i, sizeof(S), true));
  }

  template <typename S>
  void add_parameter(size_t i, Table<S>& table) {
    const size_t count = args_.x->size();
    ParamSlot<S> slot{};
    slot.x_type = check_parameter_type<S>((*args_.x)[i], name_of("x", i));
    slot.x = check_tensor("x", i, (*args_.x)[i], i, element_size(slot.x_type), true);
    slot.g_type = check_parameter_type<S>((*args_.g)[i], name_of("g", i));
    slot.g = check_tensor("g", i, (*args_.g)[i], i, element_size(slot.g_type), false);
    if (args_.v) slot.v = check_state<S>("v", i, (*args_.v)[i], i);
    if (!args_.copy->empty()) {
      slot.copy_type = check_parameter_type<S>((*args_.copy)[i], name_of("copy", i));
      slot.copy = check_tensor("copy", i, (*args_.copy)[i], i, element_size(slot.copy_type), true);
    }
    S* momenta[kMaxMomenta];
    for (int j = 0; j < args_.hyper.momenta; ++j) {
      const size_t index = j * count + i;
      momenta[j] = check_state<S>("u", index, (*args_.u)[index], i);
    }
    slot.numel = (*args_.x)[i].numel();
    if (slot.numel == 0) return;
    slot.first_block = table.blocks;
    table.blocks += (slot.numel + kBlock - 1) / kBlock;
    table.slots.push_back(slot);
    table.u.insert(table.u.end(), momenta, momenta + hyper_.momenta);
  }

  template <typename S>
  UpdateTask<S> make_task(const Table<S>& table) const {
    return {make_coefficients<S>(hyper_),
            hyper_,
            table.slots.data(),
            table.u.data(),
            int64_t(table.slots.size()),
            table.blocks,
            grad_scale_,
            found_inf_,
            t_,
            lr_};
  }

  const UpdateArgs& args_;
  const int32_t device_;
  const bool cuda_;
  Hyperparameters hyper_;
  Table<float> f32_;
  Table<double> f64_;
  Table<BFloat16> bf16_;
  const float* grad_scale_ = nullptr;
  const float* found_inf_ = nullptr;
  const int64_t* t_ = nullptr;
  const double* lr_ = nullptr;
  std::vector<MemoryRange> ranges_;
};

}  // namespace deslo
