// The operators of deslo_plugin/kernels/ for one backend, as the dispatcher calls them.
//
// A backend is a class with these static members, where `like` is a tensor on the device of the states:
//   kHostReads                           whether the host may read its tensors without waiting
//   run(UpdateTask<S>, like)             for every dtype S of states
//   drift(DriftTask, like)               returns a tensor of kSums rows there, whose columns add up to the sums
//   land(LandTask, like)
//   fingerprint(FingerprintTask, like)   returns a row of integers there, which add up to the number
//   run_records(task, like)              for QuantizeTask, MeanTask, DequantizeTask and CarryTask
#pragma once

#include <torch/csrc/stable/library.h>

#include "../cuda/kernels.h"
#include "delayed_update_checks.h"
#include "drift_checks.h"
#include "fingerprint_checks.h"
#include "quantize_checks.h"
#include "update_checks.h"

namespace deslo {

// Memory on the device of `like` for a PreparedUpdate; empty if the task needs none.
template <typename S>
Tensor allocate_prepared(const UpdateTask<S>& task, const Tensor& like) {
  const int64_t bytes = task.t || task.lr ? sizeof(PreparedUpdate<S>) : 0;
  return torch::stable::new_zeros(like, {&bytes, 1}, ScalarType::Byte);
}

template <class Backend>
void update(const UpdateArgs& args) {
  const CheckedUpdate checked(args, Backend::kHostReads);
  checked.for_each_task([&](const auto& task) { Backend::run(task, args.x->front()); });
}

inline double check_clip_value(const std::optional<double>& clip_value) {
  if (clip_value && !(*clip_value > 0)) refuse("clip_value: expected a number > 0, got ", *clip_value);
  return clip_value.value_or(0.0);
}

template <class Backend>
void sgdm_(const Tensors& x, const Tensors& g, const Tensors& u, const Tensors& copy, int64_t t, double lr,
           double weight_decay, const std::vector<double>& betas, const std::vector<double>& weights,
           const std::optional<double>& clip_value, const std::optional<Tensor>& grad_scale,
           const std::optional<Tensor>& found_inf, const std::optional<Tensor>& t_tensor,
           const std::optional<Tensor>& lr_tensor) {
  Hyperparameters hyper{Rule::kSgdm, false, 0, t, lr, weight_decay, 0.0, 0.0, check_clip_value(clip_value), {}, {}};
  set_momenta(hyper, betas, weights);
  update<Backend>({hyper, &x, &g, &u, nullptr, &copy, &grad_scale, &found_inf, &t_tensor, &lr_tensor});
}

template <class Backend>
void adam_(const Tensors& x, const Tensors& g, const Tensors& u, const Tensors& v, const Tensors& copy, int64_t t,
           double lr, double weight_decay, const std::vector<double>& betas, const std::vector<double>& weights,
           double beta2, double eps, bool bias_correction, const std::optional<double>& clip_value,
           const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
           const std::optional<Tensor>& t_tensor, const std::optional<Tensor>& lr_tensor) {
  Hyperparameters hyper{
      Rule::kAdam, bias_correction, 0, t, lr, weight_decay, beta2, eps, check_clip_value(clip_value), {}, {}};
  set_momenta(hyper, betas, weights);
  update<Backend>({hyper, &x, &g, &u, &v, &copy, &grad_scale, &found_inf, &t_tensor, &lr_tensor});
}

template <class Backend>
void adopt_(const Tensors& x, const Tensors& g, const Tensors& u, const Tensors& v, const Tensors& copy, int64_t t,
            double lr, double weight_decay, const std::vector<double>& betas, const std::vector<double>& weights,
            double beta2, double eps, const std::optional<double>& clip_value, const std::optional<Tensor>& grad_scale,
            const std::optional<Tensor>& found_inf, const std::optional<Tensor>& t_tensor,
            const std::optional<Tensor>& lr_tensor) {
  Hyperparameters hyper{Rule::kAdopt, false, 0, t, lr, weight_decay, beta2, eps, check_clip_value(clip_value), {}, {}};
  set_momenta(hyper, betas, weights);
  update<Backend>({hyper, &x, &g, &u, &v, &copy, &grad_scale, &found_inf, &t_tensor, &lr_tensor});
}

template <class Backend>
Tensor drift(const Tensors& local, const Tensors& mean) {
  const CheckedDrift checked(local, mean);
  return add_columns(checked.task.blocks ? Backend::drift(checked.task, local[0]) : make_zero_sums(local[0], 1));
}

template <class Backend>
void land_(const Tensors& x, const Tensors& local, const Tensors& mean, double factor) {
  const CheckedLanding checked(x, local, mean, factor);
  if (checked.task.blocks) Backend::land(checked.task, x[0]);
}

template <class Backend>
Tensor fingerprint(const Tensors& tensors) {
  const CheckedFingerprint checked(tensors);
  return add_words(checked.task.blocks ? Backend::fingerprint(checked.task, tensors[0])
                                       : make_zero_words(tensors[0], 1));
}

template <class Backend>
void quantize(const Tensors& values, const Tensors& bases, const Tensors& errors, const Tensor& records,
              const Tensor& own, int64_t first, int64_t format) {
  const CheckedQuantize checked(values, bases, errors, records, own, first, format);
  if (checked.task.rows) Backend::run_records(checked.task, values[0]);
}

template <class Backend>
void mean_quantized(const Tensor& received, const Tensor& own, const Tensor& weights, int64_t rank,
                    const Tensor& records, int64_t format) {
  const MeanTask task = check_mean(received, own, weights, rank, records, format);
  if (task.blocks) Backend::run_records(task, own);
}

template <class Backend>
void dequantize(const Tensor& records, const Tensors& bases, const Tensors& means, int64_t format) {
  const CheckedDequantize checked(records, bases, means, format);
  if (checked.task.blocks) Backend::run_records(checked.task, means[0]);
}

template <class Backend>
void carry_(const Tensors& values, const Tensors& bases, const Tensors& errors, const Tensors& means,
            const Tensor& sent, const Tensor& own, int64_t rank, int64_t format) {
  const CheckedCarry checked(values, bases, errors, means, sent, own, rank, format);
  if (checked.task.blocks) Backend::run_records(checked.task, values[0]);
}

template <class Backend>
void register_operators(torch::stable::detail::StableLibrary& library) {
  library.impl("sgdm_", TORCH_BOX(&sgdm_<Backend>));
  library.impl("adam_", TORCH_BOX(&adam_<Backend>));
  library.impl("adopt_", TORCH_BOX(&adopt_<Backend>));
  library.impl("drift", TORCH_BOX(&drift<Backend>));
  library.impl("land_", TORCH_BOX(&land_<Backend>));
  library.impl("fingerprint", TORCH_BOX(&fingerprint<Backend>));
  library.impl("quantize", TORCH_BOX(&quantize<Backend>));
  library.impl("mean_quantized", TORCH_BOX(&mean_quantized<Backend>));
  library.impl("dequantize", TORCH_BOX(&dequantize<Backend>));
  library.impl("carry_", TORCH_BOX(&carry_<Backend>));
}

}  // namespace deslo
