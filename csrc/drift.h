// How far a state is from its average over replicas: three sums over all elements, and the arguments of their kernels.
#pragma once

#include "update.h"

namespace deslo {

constexpr int kSums = 3;
constexpr int64_t kDriftBlock = 4096;  // elements summed as one; no block spans two tensors

// One tensor and its average. Neither is written.
struct Pair {
  void* local;
  void* mean;
  int64_t numel;
  int64_t first_block;
  Dtype local_type, mean_type;
};

struct DriftTask {
  const Pair* pairs;
  int64_t pair_count;
  int64_t blocks;
};

// sums += |l - m|^2, l m, |m|^2, the terms of one element or of a vector of them. A NaN or inf in m stays in the third.
template <typename V>
DESLO_INLINE void add_drift(V l, V m, V& distance, V& product, V& square) {
  const V d = l - m;
  distance += d * d;
  product += l * m;
  square += m * m;
}

}  // namespace deslo
