// The arguments of the update kernels: plain pointers and numbers, checked by torch/update_checks.h.
#pragma once

#include "rules.h"

namespace deslo {

constexpr int kBlock = 64;  // elements; no block spans two tensors

// One parameter, its gradient (never written) and second momentum. v is null for sgdm; copy is null if no copy is asked
// for.
template <typename S>
struct ParamSlot {
  void* x;
  void* g;
  S* v;
  void* copy;
  int64_t numel;
  int64_t first_block;
  Dtype x_type, g_type, copy_type;
};

// One call of one rule on tensors whose states have type S.
template <typename S>
struct UpdateTask {
  Coefficients<S> coefficients;
  Hyperparameters hyper;
  const ParamSlot<S>* slots;
  S* const* u;  // u[slot * momenta + j]
  int64_t slot_count;
  int64_t blocks;
  const float* grad_scale;  // on the tensors' device; null: 1
  const float* found_inf;   // likewise; not 0: nothing is written
  const int64_t* t;         // likewise; not null: the kernels compute the coefficients from *t and *lr on the device
  const double* lr;
};

// The index of the slot that holds a block, among `count` slots.
template <typename S>
DESLO_INLINE int64_t find_slot(const S* slots, int64_t count, int64_t block) {
  int64_t low = 0;
  while (count > 1) {
    const int64_t half = count / 2;
    low = slots[low + half].first_block <= block ? low + half : low;
    count -= half;
  }
  return low;
}

}  // namespace deslo
