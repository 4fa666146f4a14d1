// The CPU kernels of the rules. setup.py compiles this file once per instruction set, with DESLO_ISA as its name;
// torch/bindings.cpp chooses.
#include "blocks.h"

namespace deslo::DESLO_ISA {
namespace {

// One element of v in the type that the arithmetic has; 0 for sgdm, which has no second moment.
template <class UpdateRule, typename S>
DESLO_INLINE Arithmetic<S> second_moment(const S* v, int64_t e) {
  if constexpr (UpdateRule::kSecondMoment) return to_arithmetic(v[e]);
  return 0;
}

// N known: a single loop, however long. One stream per tensor is what the hardware prefetches best: shorter loops with
// software prefetching were slower. `first` is the index of the first element in its tensor.
template <class UpdateRule, int N, typename S, typename T>
DESLO_INLINE void update_run(const Coefficients<S>& c, int64_t length, uint32_t first, T* x, const T* g, S* const* u,
                             S* v) {
  uint32_t index = first;
#pragma omp simd linear(index)
  for (int64_t e = 0; e < length; ++e) {
    T v_e = second_moment<UpdateRule>(v, e);
    const T z = UpdateRule::normalize_gradient(c, g[e], &v_e);
    T d = c.rest * z;
    for (int j = 0; j < N; ++j) {
      T u_e = to_arithmetic(u[j][e]);
      update_momentum(c, j, z, u_e, d);
      u[j][e] = c.round_state(u_e, 1 + j, index);
    }
    UpdateRule::apply(c, x[e], d, g[e], &v_e);
    if constexpr (UpdateRule::kSecondMoment) v[e] = c.round_state(v_e, 0, index);
    ++index;
  }
}

// Any number of momenta: one block, a loop for each momentum.
template <class UpdateRule, typename S, typename T>
DESLO_INLINE void update_block(const Coefficients<S>& c, uint32_t first, T* x, const T* g, S* const* u, S* v) {
  Block<T> z, d;
#pragma omp simd
  for (int e = 0; e < kBlock; ++e) {
    const T v_e = second_moment<UpdateRule>(v, e);
    z.at[e] = UpdateRule::normalize_gradient(c, g[e], &v_e);
    d.at[e] = c.rest * z.at[e];
  }
  for (int j = 0; j < c.momenta; ++j) {
    S* const u_j = u[j];
#pragma omp simd
    for (int e = 0; e < kBlock; ++e) {
      T u_e = to_arithmetic(u_j[e]);
      update_momentum(c, j, z.at[e], u_e, d.at[e]);
      u_j[e] = c.round_state(u_e, 1 + j, first + e);
    }
  }
#pragma omp simd
  for (int e = 0; e < kBlock; ++e) {
    T v_e = second_moment<UpdateRule>(v, e);
    UpdateRule::apply(c, x[e], d.at[e], g[e], &v_e);
    if constexpr (UpdateRule::kSecondMoment) v[e] = c.round_state(v_e, 0, first + e);
  }
}

// Blocks begin..end of a task, one after the other. N = 0 stands for any number of momenta.
template <class UpdateRule, int N, typename S>
void update(const UpdateTask<S>& task, int64_t begin, int64_t end) {
  using T = Arithmetic<S>;
  const Coefficients<S> c = task.coefficients;
  const int momenta = N ? N : c.momenta;
  const T scale = task.grad_scale ? T(*task.grad_scale) : T(1);
  const bool raw = scale == T(1) && !(c.clip_value > T(0));
  const FlushSubnormals flush;
  // the last block of a tensor is filled up with zeros: those are computed too, and not stored
  Block<T> x_block{}, g_block{};
  Block<S> v_block{}, u_block[N ? N : kMaxMomenta]{};
  S* u[N ? N : kMaxMomenta];

  int64_t index = find_slot(task.slots, task.slot_count, begin), run;
  for (int64_t block = begin; block < end; block += run) {
    while (index + 1 < task.slot_count && task.slots[index + 1].first_block <= block) ++index;
    const ParamSlot<S>& slot = task.slots[index];
    S* const* const slot_u = task.u + index * momenta;
    const int64_t offset = (block - slot.first_block) * kBlock;
    const int64_t left = slot.numel - offset, count = left < kBlock ? left : kBlock;
    const bool in_place = N && raw && slot.x_type == kDtype<T> && slot.g_type == kDtype<T> && !slot.copy;
    const int64_t whole = left / kBlock < end - block ? left / kBlock : end - block;
    run = in_place && whole ? whole : 1;

    T* const x = load(slot.x, slot.x_type, offset, count, x_block);
    S* const v = UpdateRule::kSecondMoment ? load_block(slot.v + offset, count, v_block) : nullptr;
    T* g = load(slot.g, slot.g_type, offset, count, g_block);
    for (int j = 0; j < momenta; ++j) u[j] = load_block(slot_u[j] + offset, count, u_block[j]);
    if (!raw) {
#pragma omp simd
      for (int e = 0; e < kBlock; ++e) g_block.at[e] = prepare_gradient(c, scale, g[e]);
      g = g_block.at;
    }

    if constexpr (N > 0) {
      update_run<UpdateRule, N>(c, run * kBlock, uint32_t(offset), x, g, u, v);
    } else {
      update_block<UpdateRule>(c, uint32_t(offset), x, g, u, v);
    }

    store(x, slot.x, slot.x_type, offset, count);
    if (UpdateRule::kSecondMoment) store_block(v, slot.v + offset, count);
    for (int j = 0; j < momenta; ++j) store_block(u[j], slot_u[j] + offset, count);
    if (slot.copy) store(x, slot.copy, slot.copy_type, offset, count);
  }
}

template <class UpdateRule, typename S>
void update_by_count(const UpdateTask<S>& task, int64_t begin, int64_t end) {
  switch (task.hyper.momenta) {
    case 1: return update<UpdateRule, 1>(task, begin, end);
    case 2: return update<UpdateRule, 2>(task, begin, end);
    case 3: return update<UpdateRule, 3>(task, begin, end);
    case 4: return update<UpdateRule, 4>(task, begin, end);
    default: return update<UpdateRule, 0>(task, begin, end);
  }
}

template <typename S>
void update_by_rule(const UpdateTask<S>& task, int64_t begin, int64_t end) {
  switch (task.hyper.rule) {
    case Rule::kSgdm: return update_by_count<Sgdm>(task, begin, end);
    case Rule::kAdam: return update_by_count<Adam>(task, begin, end);
    case Rule::kAdopt: return update_by_count<Adopt>(task, begin, end);
    case Rule::kAdoptStart: return update<AdoptStart, 0>(task, begin, end);
  }
}

}  // namespace

void update_blocks(const UpdateTask<float>& task, int64_t begin, int64_t end) { update_by_rule(task, begin, end); }
void update_blocks(const UpdateTask<BFloat16>& task, int64_t begin, int64_t end) { update_by_rule(task, begin, end); }
void update_blocks(const UpdateTask<double>& task, int64_t begin, int64_t end) { update_by_rule(task, begin, end); }

}  // namespace deslo::DESLO_ISA
