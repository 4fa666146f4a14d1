// The operators of deslo_plugin/kernels/ for one backend, as the dispatcher calls them.
//
// A backend is a class with kHostReads, whether the host may read its tensors without waiting, and with static functions
// run(Task<S>, like) for every dtype S of states, like being a tensor on their device; drift(DriftTask, like): a tensor of
// kSums rows on the device of `like` whose columns add up to the sums; land(LandTask, like); and
// fingerprint(FingerprintTask, like): a row of integers there that add up to the number.
#pragma once

#include <torch/csrc/stable/library.h>

#include "../cuda/kernels.h"
#include "delayed_update_checks.h"
#include "drift_checks.h"
#include "fingerprint_checks.h"
#include "update_checks.h"

namespace deslo {

// Bytes on the device of `like` for what a CUDA launch prepares there; none if it need not.
template <typename S>
Tensor room_for_prepared(const Task<S>& task, const Tensor& like) {
  const int64_t bytes = task.t || task.lr ? sizeof(Prepared<S>) : 0;
  return torch::stable::new_zeros(like, {&bytes, 1}, ScalarType::Byte);
}

template <class Backend>
void update(const Call& call) {
  const Launch launch(call, Backend::kHostReads);
  launch.each([&](const auto& task) { Backend::run(task, call.x->front()); });
}

inline double checked_clip(const std::optional<double>& clip_value) {
  if (clip_value && !(*clip_value > 0)) refuse("clip_value: expected a number > 0, got ", *clip_value);
  return clip_value.value_or(0.0);
}

template <class Backend>
void sgdm_(
    const Tensors& x, const Tensors& g, const Tensors& u, const Tensors& copy, int64_t t, double lr, double weight_decay,
    const std::vector<double>& betas, const std::vector<double>& weights, const std::optional<double>& clip_value,
    const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
    const std::optional<Tensor>& t_tensor, const std::optional<Tensor>& lr_tensor) {
  Hyper hyper{Rule::kSgdm, false, 0, t, lr, weight_decay, 0.0, 0.0, checked_clip(clip_value), {}, {}};
  set_momenta(hyper, betas, weights);
  update<Backend>({hyper, &x, &g, &u, nullptr, &copy, &grad_scale, &found_inf, &t_tensor, &lr_tensor});
}

template <class Backend>
void adam_(
    const Tensors& x, const Tensors& g, const Tensors& u, const Tensors& v, const Tensors& copy, int64_t t, double lr,
    double weight_decay, const std::vector<double>& betas, const std::vector<double>& weights, double beta2, double eps,
    bool bias_correction, const std::optional<double>& clip_value, const std::optional<Tensor>& grad_scale,
    const std::optional<Tensor>& found_inf, const std::optional<Tensor>& t_tensor, const std::optional<Tensor>& lr_tensor) {
  Hyper hyper{Rule::kAdam, bias_correction, 0, t, lr, weight_decay, beta2, eps, checked_clip(clip_value), {}, {}};
  set_momenta(hyper, betas, weights);
  update<Backend>({hyper, &x, &g, &u, &v, &copy, &grad_scale, &found_inf, &t_tensor, &lr_tensor});
}

template <class Backend>
void adopt_(
    const Tensors& x, const Tensors& g, const Tensors& u, const Tensors& v, const Tensors& copy, int64_t t, double lr,
    double weight_decay, const std::vector<double>& betas, const std::vector<double>& weights, double beta2, double eps,
    const std::optional<double>& clip_value, const std::optional<Tensor>& grad_scale,
    const std::optional<Tensor>& found_inf, const std::optional<Tensor>& t_tensor, const std::optional<Tensor>& lr_tensor) {
  Hyper hyper{Rule::kAdopt, false, 0, t, lr, weight_decay, beta2, eps, checked_clip(clip_value), {}, {}};
  set_momenta(hyper, betas, weights);
  update<Backend>({hyper, &x, &g, &u, &v, &copy, &grad_scale, &found_inf, &t_tensor, &lr_tensor});
}

template <class Backend>
Tensor drift(const Tensors& local, const Tensors& mean) {
  const DriftLaunch launch(local, mean);
  return total(launch.task.blocks ? Backend::drift(launch.task, local[0]) : zero_sums(local[0], 1));
}

template <class Backend>
void land_(const Tensors& x, const Tensors& local, const Tensors& mean, double factor) {
  const LandLaunch launch(x, local, mean, factor);
  if (launch.task.blocks) Backend::land(launch.task, x[0]);
}

template <class Backend>
Tensor fingerprint(const Tensors& tensors) {
  const FingerprintLaunch launch(tensors);
  return added_up(launch.task.blocks ? Backend::fingerprint(launch.task, tensors[0]) : zero_words(tensors[0], 1));
}

template <class Backend>
void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("sgdm_", TORCH_BOX(&sgdm_<Backend>));
  library.impl("adam_", TORCH_BOX(&adam_<Backend>));
  library.impl("adopt_", TORCH_BOX(&adopt_<Backend>));
  library.impl("drift", TORCH_BOX(&drift<Backend>));
  library.impl("land_", TORCH_BOX(&land_<Backend>));
  library.impl("fingerprint", TORCH_BOX(&fingerprint<Backend>));
}

}  // namespace deslo
