// Checks the arguments of deslo::land_ and makes the task of its kernels.
#pragma once

#include "../delayed_update.h"
#include "argument_checks.h"

namespace deslo {

class CheckedLanding {
 public:
  CheckedLanding(const Tensors& x, const Tensors& local, const Tensors& mean, double factor) {
    if (x.empty()) refuse("x: expected one tensor or more, got an empty list");
    if (local.size() != x.size()) refuse("local: expected ", x.size(), " tensors, got ", local.size());
    if (mean.size() != x.size()) refuse("mean: expected ", x.size(), " tensors, got ", mean.size());
    int64_t blocks = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const Dtype types[] = {check_tensor("x", i, x[i], x, true), check_tensor("local", i, local[i], x, false),
                             check_tensor("mean", i, mean[i], x, false)};
      const bool is_f64 = types[2] == Dtype::kFloat64;
      if (!is_f64 && types[2] != Dtype::kFloat32) {
        refuse(name_of("mean", i), ": expected float32 or float64, got ", kDtypeNames[int(types[2])]);
      }
      if (types[1] != types[2]) {
        refuse(name_of("local", i), ": expected ", kDtypeNames[int(types[2])], " as mean[", i, "] is, got ",
               kDtypeNames[int(types[1])]);
      }
      if (types[0] == Dtype::kFloat64 && !is_f64) {
        refuse(name_of("x", i), ": expected float32, bfloat16 or float16 with a float32 mean, got float64");
      }
      const int64_t numel = x[i].numel();
      if (numel == 0) continue;
      landings_.push_back({x[i].mutable_data_ptr(), local[i].mutable_data_ptr(), mean[i].mutable_data_ptr(), numel,
                           blocks, types[0], types[2]});
      blocks += (numel + kBlock - 1) / kBlock;
    }
    refuse_overlap(ranges_);
    task = {factor, landings_.data(), int64_t(landings_.size()), blocks};
  }

  LandTask task;

 private:
  Dtype check_tensor(const char* name, size_t i, const Tensor& tensor, const Tensors& x, bool written) {
    if (!same_device(tensor, x[0])) refuse(name_of(name, i), ": expected the device of x[0], got another");
    if (!tensor.is_contiguous()) refuse(name_of(name, i), ": expected a contiguous tensor");
    if (!are_equal(tensor.sizes(), x[i].sizes())) {
      refuse(name_of(name, i), ": expected shape ", format_shape(x[i].sizes()), " of x[", i, "], got ",
             format_shape(tensor.sizes()));
    }
    const Dtype type = dtype_of(tensor, name_of(name, i));
    const char* const data = static_cast<const char*>(tensor.const_data_ptr());
    if (tensor.numel()) ranges_.push_back({data, data + tensor.numel() * element_size(type), name, i, written});
    return type;
  }

  std::vector<Landing> landings_;
  std::vector<MemoryRange> ranges_;
};

}  // namespace deslo
