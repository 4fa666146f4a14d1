// Checks the arguments of deslo::fingerprint and makes the task of its kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../fingerprint.h"
#include "argument_checks.h"

namespace deslo {

class CheckedFingerprint {
 public:
  explicit CheckedFingerprint(const Tensors& tensors) {
    if (tensors.empty()) refuse("tensors: expected one tensor or more, got an empty list");
    int64_t blocks = 0;
    spans_.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const ArgumentName name = name_of("tensors", i);
      if (!same_device(tensors[i], tensors[0])) refuse(name, ": expected the device of tensors[0], got another");
      if (!tensors[i].is_contiguous()) refuse(name, ": expected a contiguous tensor");
      const int64_t bytes = tensors[i].numel() * int64_t(tensors[i].element_size());
      if (bytes == 0) continue;
      spans_.push_back({tensors[i].const_data_ptr(), bytes, blocks});
      blocks += (bytes + kBlockBytes - 1) / kBlockBytes;
    }
    task = {spans_.data(), int64_t(spans_.size()), blocks};
  }

  FingerprintTask task;

 private:
  std::vector<Span> spans_;
};

// A row of zeros on the device of `like`; add_words adds up such a row of partial sums.
inline Tensor make_zero_words(const Tensor& like, int64_t count) {
  return torch::stable::new_zeros(like, {&count, 1}, ScalarType::Long);
}

inline Tensor add_words(const Tensor& words) {
  const int64_t row = 0;
  return torch::stable::sum(words, torch::headeronly::IntHeaderOnlyArrayRef(&row, 1));
}

}  // namespace deslo
