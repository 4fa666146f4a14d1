// From a call of deslo::drift to its task: checks that name the argument, then plain pointers.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../drift.h"
#include "argument_checks.h"

namespace deslo {

class DriftLaunch {
 public:
  DriftLaunch(const Tensors& local, const Tensors& mean) {
    if (local.empty()) refuse("local: expected one tensor or more, got an empty list");
    if (mean.size() != local.size()) refuse("mean: expected ", local.size(), " tensors, got ", mean.size());
    int64_t blocks = 0;
    for (size_t i = 0; i < local.size(); ++i) {
      const Dtype local_type = checked(at("local", i), local[i], local[0]);
      const Dtype mean_type = checked(at("mean", i), mean[i], local[0]);
      if (mean_type != Dtype::kFloat32 && mean_type != Dtype::kFloat64) {
        refuse(at("mean", i), ": expected float32 or float64, got ", kNames[int(mean_type)]);
      }
      if (!same(mean[i].sizes(), local[i].sizes())) {
        refuse(at("mean", i), ": expected shape ", shown(local[i].sizes()), " of local[", i, "], got ", shown(mean[i].sizes()));
      }
      const int64_t numel = local[i].numel();
      if (numel == 0) continue;
      pairs_.push_back({local[i].mutable_data_ptr(), mean[i].mutable_data_ptr(), numel, blocks, local_type, mean_type});
      blocks += (numel + kDriftBlock - 1) / kDriftBlock;
    }
    task = {pairs_.data(), int64_t(pairs_.size()), blocks};
  }

  DriftTask task;

 private:
  static Dtype checked(const Name& name, const Tensor& tensor, const Tensor& first) {
    if (!same_device(tensor, first)) refuse(name, ": expected the device of local[0], got another");
    if (!tensor.is_contiguous()) refuse(name, ": expected a contiguous tensor");
    return dtype_of(tensor, name);
  }

  std::vector<Pair> pairs_;
};

// kSums rows of zeros on the device of `like`, and what rows of partial sums add up to.
inline Tensor zero_sums(const Tensor& like, int64_t columns) {
  const int64_t sizes[] = {kSums, columns};
  return torch::stable::new_zeros(like, {sizes, 2}, ScalarType::Double);
}

inline Tensor total(const Tensor& sums) {
  const int64_t columns = 1;
  return torch::stable::sum(sums, torch::headeronly::IntHeaderOnlyArrayRef(&columns, 1));
}

}  // namespace deslo
