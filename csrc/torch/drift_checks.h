// Checks the arguments of deslo::drift and makes the task of its kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../drift.h"
#include "argument_checks.h"

namespace deslo {

class CheckedDrift {
 public:
  CheckedDrift(const Tensors& local, const Tensors& mean) {
    if (local.empty()) refuse("local: expected one tensor or more, got an empty list");
    if (mean.size() != local.size()) refuse("mean: expected ", local.size(), " tensors, got ", mean.size());
    int64_t blocks = 0;
    for (size_t i = 0; i < local.size(); ++i) {
      const Dtype local_type = check_tensor(name_of("local", i), local[i], local[0]);
      const Dtype mean_type = check_tensor(name_of("mean", i), mean[i], local[0]);
      if (mean_type != Dtype::kFloat32 && mean_type != Dtype::kFloat64) {
        refuse(name_of("mean", i), ": expected float32 or float64, got ", kDtypeNames[int(mean_type)]);
      }
      if (!are_equal(mean[i].sizes(), local[i].sizes())) {
        refuse(name_of("mean", i), ": expected shape ", format_shape(local[i].sizes()), " of local[", i, "], got ",
               format_shape(mean[i].sizes()));
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
  static Dtype check_tensor(const ArgumentName& name, const Tensor& tensor, const Tensor& first) {
    if (!same_device(tensor, first)) refuse(name, ": expected the device of local[0], got another");
    if (!tensor.is_contiguous()) refuse(name, ": expected a contiguous tensor");
    return dtype_of(tensor, name);
  }

  std::vector<Pair> pairs_;
};

// kSums rows of zeros on the device of `like`; add_columns adds up such rows of partial sums.
inline Tensor make_zero_sums(const Tensor& like, int64_t columns) {
  const int64_t sizes[] = {kSums, columns};
  return torch::stable::new_zeros(like, {sizes, 2}, ScalarType::Double);
}

inline Tensor add_columns(const Tensor& sums) {
  const int64_t columns = 1;
  return torch::stable::sum(sums, torch::headeronly::IntHeaderOnlyArrayRef(&columns, 1));
}

}  // namespace deslo
