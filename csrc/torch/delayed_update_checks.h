// From a call of deslo::land_ to its task: checks that name the argument, then plain pointers.
#pragma once

#include "../delayed_update.h"
#include "argument_checks.h"

namespace deslo {

class LandLaunch {
 public:
  LandLaunch(const Tensors& x, const Tensors& local, const Tensors& mean, double factor) {
    if (x.empty()) refuse("x: expected one tensor or more, got an empty list");
    if (local.size() != x.size()) refuse("local: expected ", x.size(), " tensors, got ", local.size());
    if (mean.size() != x.size()) refuse("mean: expected ", x.size(), " tensors, got ", mean.size());
    int64_t blocks = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const Dtype types[] = {checked("x", i, x[i], x, true), checked("local", i, local[i], x, false),
                             checked("mean", i, mean[i], x, false)};
      const bool twice = types[2] == Dtype::kFloat64;
      if (!twice && types[2] != Dtype::kFloat32) {
        refuse(at("mean", i), ": expected float32 or float64, got ", kNames[int(types[2])]);
      }
      if (types[1] != types[2]) {
        refuse(at("local", i), ": expected ", kNames[int(types[2])], " as mean[", i, "] is, got ", kNames[int(types[1])]);
      }
      if (types[0] == Dtype::kFloat64 && !twice) {
        refuse(at("x", i), ": expected float32, bfloat16 or float16 with a float32 mean, got float64");
      }
      const int64_t numel = x[i].numel();
      if (numel == 0) continue;
      landings_.push_back({x[i].mutable_data_ptr(), local[i].mutable_data_ptr(), mean[i].mutable_data_ptr(), numel, blocks,
                           types[0], types[2]});
      blocks += (numel + kBlock - 1) / kBlock;
    }
    refuse_overlap(stretches_);
    task = {factor, landings_.data(), int64_t(landings_.size()), blocks};
  }

  LandTask task;

 private:
  Dtype checked(const char* name, size_t i, const Tensor& tensor, const Tensors& x, bool written) {
    if (!same_device(tensor, x[0])) refuse(at(name, i), ": expected the device of x[0], got another");
    if (!tensor.is_contiguous()) refuse(at(name, i), ": expected a contiguous tensor");
    if (!same(tensor.sizes(), x[i].sizes())) {
      refuse(at(name, i), ": expected shape ", shown(x[i].sizes()), " of x[", i, "], got ", shown(tensor.sizes()));
    }
    const Dtype type = dtype_of(tensor, at(name, i));
    const char* const data = static_cast<const char*>(tensor.const_data_ptr());
    if (tensor.numel()) stretches_.push_back({data, data + tensor.numel() * width(type), name, i, written});
    return type;
  }

  std::vector<Landing> landings_;
  std::vector<Stretch> stretches_;
};

}  // namespace deslo
