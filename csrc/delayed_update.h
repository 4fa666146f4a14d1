// An average that lands late: x += factor (mean - local), and what the kernels for it are given.
#pragma once

#include "update.h"

namespace deslo {

// One state, which is written, the copy of it that was averaged, and the average.
struct Landing {
  void* x;
  void* local;
  void* mean;
  int64_t numel;
  int64_t first_block;
  Dtype x_type, mean_type;  // that of local is that of mean
};

struct LandTask {
  double factor;
  const Landing* landings;
  int64_t count;
  int64_t blocks;
};

// X is what x is held in, float for the 16-bit formats too; T is what mean has and what is computed in.
template <typename X, typename T>
DESLO_INLINE void land(T factor, X& x, T local, T mean) {
  x = X(T(x) + factor * (mean - local));
}

}  // namespace deslo
