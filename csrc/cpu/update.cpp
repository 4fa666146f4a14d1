// The CPU kernels of the rules. setup.py compiles this file once per instruction set, with DESLO_ISA as its name;
// torch/bindings.cpp chooses.
#include "blocks.h"

namespace deslo::DESLO_ISA {
namespace {

// What a law makes of one v, which sgdm has not.
template <class Law, typename S>
DESLO_INLINE Arithmetic<S> second_moment(const S* v, int64_t e) {
  if constexpr (Law::kSecondMoment) return widened(v[e]);
  return 0;
}

// N known: a single loop, however long. One stream per tensor is what the hardware prefetches best: shorter loops with
// software prefetching were slower. `first` is the index of the first element in its tensor.
template <class Law, int N, typename S, typename T>
DESLO_INLINE void update_run(
    const Recipe<S>& c, int64_t length, uint32_t first, T* x, const T* g, S* const* u, S* v) {
  uint32_t index = first;
#pragma omp simd linear(index)
  for (int64_t e = 0; e < length; ++e) {
    T v_e = second_moment<Law>(v, e);
    const T z = Law::direction(c, g[e], &v_e);
    T d = c.rest * z;
    for (int j = 0; j < N; ++j) {
      T u_e = widened(u[j][e]);
      follow(c, j, z, u_e, d);
      u[j][e] = c.stored(u_e, 1 + j, index);
    }
    Law::apply(c, x[e], d, g[e], &v_e);
    if constexpr (Law::kSecondMoment) v[e] = c.stored(v_e, 0, index);
    ++index;
  }
}

// Any number of momenta: one block, a loop for each momentum.
template <class Law, typename S, typename T>
DESLO_INLINE void update_block(const Recipe<S>& c, uint32_t first, T* x, const T* g, S* const* u, S* v) {
  Block<T> z, d;
#pragma omp simd
  for (int e = 0; e < kBlock; ++e) {
    const T v_e = second_moment<Law>(v, e);
    z.at[e] = Law::direction(c, g[e], &v_e);
    d.at[e] = c.rest * z.at[e];
  }
  for (int j = 0; j < c.momenta; ++j) {
    S* const u_j = u[j];
#pragma omp simd
    for (int e = 0; e < kBlock; ++e) {
      T u_e = widened(u_j[e]);
      follow(c, j, z.at[e], u_e, d.at[e]);
      u_j[e] = c.stored(u_e, 1 + j, first + e);
    }
  }
#pragma omp simd
  for (int e = 0; e < kBlock; ++e) {
    T v_e = second_moment<Law>(v, e);
    Law::apply(c, x[e], d.at[e], g[e], &v_e);
    if constexpr (Law::kSecondMoment) v[e] = c.stored(v_e, 0, first + e);
  }
}

// Blocks begin..end of a task, one after the other. N = 0 stands for any number of momenta.
template <class Law, int N, typename S>
void update(const Task<S>& task, int64_t begin, int64_t end) {
  using T = Arithmetic<S>;
  const Recipe<S> c = task.recipe;
  const int momenta = N ? N : c.momenta;
  const T scale = task.grad_scale ? T(*task.grad_scale) : T(1);
  const bool raw = scale == T(1) && !(c.clip_value > T(0));
  const FlushSubnormals flush;
  // what lies beyond the end of a tensor is computed too, on zeros, and not stored
  Block<T> x_block{}, g_block{};
  Block<S> v_block{}, u_block[N ? N : kMaxMomenta]{};
  S* u[N ? N : kMaxMomenta];

  int64_t index = slot_of(task.slots, task.slot_count, begin), run;
  for (int64_t block = begin; block < end; block += run) {
    while (index + 1 < task.slot_count && task.slots[index + 1].first_block <= block) ++index;
    const Slot<S>& slot = task.slots[index];
    S* const* const slot_u = task.u + index * momenta;
    const int64_t offset = (block - slot.first_block) * kBlock;
    const int64_t left = slot.numel - offset, count = left < kBlock ? left : kBlock;
    const bool in_place = N && raw && slot.x_type == kDtype<T> && slot.g_type == kDtype<T> && !slot.copy;
    const int64_t whole = left / kBlock < end - block ? left / kBlock : end - block;
    run = in_place && whole ? whole : 1;

    T* const x = load(slot.x, slot.x_type, offset, count, x_block);
    S* const v = Law::kSecondMoment ? reach(slot.v + offset, count, v_block) : nullptr;
    T* g = load(slot.g, slot.g_type, offset, count, g_block);
    for (int j = 0; j < momenta; ++j) u[j] = reach(slot_u[j] + offset, count, u_block[j]);
    if (!raw) {
#pragma omp simd
      for (int e = 0; e < kBlock; ++e) g_block.at[e] = prepared(c, scale, g[e]);
      g = g_block.at;
    }

    if constexpr (N > 0) {
      update_run<Law, N>(c, run * kBlock, uint32_t(offset), x, g, u, v);
    } else {
      update_block<Law>(c, uint32_t(offset), x, g, u, v);
    }

    store(x, slot.x, slot.x_type, offset, count);
    if (Law::kSecondMoment) put(v, slot.v + offset, count);
    for (int j = 0; j < momenta; ++j) put(u[j], slot_u[j] + offset, count);
    if (slot.copy) store(x, slot.copy, slot.copy_type, offset, count);
  }
}

template <class Law, typename S>
void update_by_count(const Task<S>& task, int64_t begin, int64_t end) {
  switch (task.hyper.momenta) {
    case 1: return update<Law, 1>(task, begin, end);
    case 2: return update<Law, 2>(task, begin, end);
    case 3: return update<Law, 3>(task, begin, end);
    case 4: return update<Law, 4>(task, begin, end);
    default: return update<Law, 0>(task, begin, end);
  }
}

template <typename S>
void update_by_rule(const Task<S>& task, int64_t begin, int64_t end) {
  switch (task.hyper.rule) {
    case Rule::kSgdm: return update_by_count<Sgdm>(task, begin, end);
    case Rule::kAdam: return update_by_count<Adam>(task, begin, end);
    case Rule::kAdopt: return update_by_count<Adopt>(task, begin, end);
    case Rule::kAdoptStart: return update<AdoptStart, 0>(task, begin, end);
  }
}

}  // namespace

void update_blocks(const Task<float>& task, int64_t begin, int64_t end) { update_by_rule(task, begin, end); }
void update_blocks(const Task<BFloat16>& task, int64_t begin, int64_t end) { update_by_rule(task, begin, end); }
void update_blocks(const Task<double>& task, int64_t begin, int64_t end) { update_by_rule(task, begin, end); }

}  // namespace deslo::DESLO_ISA
