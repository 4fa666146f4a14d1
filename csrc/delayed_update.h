// Applies an average that arrives some steps late: x += factor (mean - local). Also the arguments of its kernels.
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

// X is the type of x, float for the 16-bit formats too; T is the type of mean and of the arithmetic.
template <typename X, typename T>
DESLO_INLINE void land(T factor, X& x, T local, T mean) {
  x = X(T(x) + factor * (mean - local));
}

}  // namespace deslo
