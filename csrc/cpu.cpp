// The CPU kernel. setup.py compiles this file once per instruction set, with DESLO_ISA as its name; ops.cpp chooses.
//
// Everything here is inlined or in the namespace of the instruction set: a function shared with another object file could
// end up compiled for instructions that the machine lacks.
#include "cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace deslo::DESLO_ISA {
namespace {

// Treats subnormal numbers as zero while it lives: momenta that fade out would slow every later step tenfold.
class FlushSubnormals {
#if defined(__x86_64__)
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
 public:
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | (uint64_t(1) << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};

template <typename T>
struct Block {
  alignas(64) T at[kBlock];
};

// The 16-bit formats pay for a call, so that the kernels stay small.
template <typename T, typename S>
__attribute__((noinline)) void widen(const S* from, int64_t count, T* to) {
  if (count == kBlock) {
#pragma omp simd
    for (int e = 0; e < kBlock; ++e) to[e] = T(from[e].to_float());
  } else {
    for (int64_t e = 0; e < count; ++e) to[e] = T(from[e].to_float());
  }
}

template <typename T, typename S>
__attribute__((noinline)) void narrow(const T* from, int64_t count, S* to) {
  if (count == kBlock) {
#pragma omp simd
    for (int e = 0; e < kBlock; ++e) to[e] = S::of_float(float(from[e]));
  } else {
    for (int64_t e = 0; e < count; ++e) to[e] = S::of_float(float(from[e]));
  }
}

// `count` elements at `offset`, as T: where they lie if they are a whole block of T, else in `block`.
template <typename T>
DESLO_INLINE T* load(void* data, Dtype type, int64_t offset, int64_t count, Block<T>& block) {
  if (type == Dtype::kBFloat16) {
    widen(static_cast<BFloat16*>(data) + offset, count, block.at);
  } else if (type == Dtype::kFloat16) {
    widen(static_cast<Float16*>(data) + offset, count, block.at);
  } else if (count < kBlock) {
    memcpy(block.at, static_cast<T*>(data) + offset, count * sizeof(T));
  } else {
    return static_cast<T*>(data) + offset;
  }
  return block.at;
}

// Brings `from` to its place, if it is not there already.
template <typename T>
DESLO_INLINE void store(const T* from, void* data, Dtype type, int64_t offset, int64_t count) {
  if (type == Dtype::kBFloat16) {
    narrow(from, count, static_cast<BFloat16*>(data) + offset);
  } else if (type == Dtype::kFloat16) {
    narrow(from, count, static_cast<Float16*>(data) + offset);
  } else if (T* const place = static_cast<T*>(data) + offset; place != from) {
    memcpy(place, from, count * sizeof(T));
  }
}

// N known: a single loop, however long. One stream per tensor is what the hardware prefetches best: shorter loops with
// software prefetching were slower.
template <class Law, int N, typename T>
DESLO_INLINE void update_run(const Constants<T>& c, int64_t length, T* x, const T* g, T* const* u, T* v) {
#pragma omp simd
  for (int64_t e = 0; e < length; ++e) {
    const T z = Law::direction(c, g[e], v + e);
    T d = c.rest * z;
    for (int j = 0; j < N; ++j) follow(c, j, z, u[j][e], d);
    Law::apply(c, x[e], d, g[e], v + e);
  }
}

// Any number of momenta: one block, a loop for each momentum.
template <class Law, typename T>
DESLO_INLINE void update_block(const Constants<T>& c, T* x, const T* g, T* const* u, T* v) {
  Block<T> z, d;
#pragma omp simd
  for (int e = 0; e < kBlock; ++e) {
    z.at[e] = Law::direction(c, g[e], v + e);
    d.at[e] = c.rest * z.at[e];
  }
  for (int j = 0; j < c.momenta; ++j) {
    T* const u_j = u[j];
#pragma omp simd
    for (int e = 0; e < kBlock; ++e) follow(c, j, z.at[e], u_j[e], d.at[e]);
  }
#pragma omp simd
  for (int e = 0; e < kBlock; ++e) Law::apply(c, x[e], d.at[e], g[e], v + e);
}

// Blocks begin..end of a task, one after the other. N = 0 stands for any number of momenta.
template <class Law, int N, typename T>
void update(const Task<T>& task, int64_t begin, int64_t end) {
  const Constants<T> c = constants<T>(task.hyper);
  const int momenta = N ? N : c.momenta;
  const T scale = task.grad_scale ? T(*task.grad_scale) : T(1);
  const bool raw = scale == T(1) && !(c.clip_value > T(0));
  const FlushSubnormals flush;
  // what lies beyond the end of a tensor is computed too, on zeros, and not stored
  Block<T> x_block{}, g_block{}, v_block{}, u_block[N ? N : kMaxMomenta]{};
  T* u[N ? N : kMaxMomenta];

  int64_t index = slot_of(task.slots, task.slot_count, begin), run;
  for (int64_t block = begin; block < end; block += run) {
    while (index + 1 < task.slot_count && task.slots[index + 1].first_block <= block) ++index;
    const Slot<T>& slot = task.slots[index];
    T* const* const slot_u = task.u + index * momenta;
    const int64_t offset = (block - slot.first_block) * kBlock;
    const int64_t left = slot.numel - offset, count = left < kBlock ? left : kBlock;
    const bool in_place = N && raw && slot.x_type == kDtype<T> && slot.g_type == kDtype<T> && !slot.copy;
    const int64_t whole = left / kBlock < end - block ? left / kBlock : end - block;
    run = in_place && whole ? whole : 1;

    T* const x = load(slot.x, slot.x_type, offset, count, x_block);
    T* const v = Law::kSecondMoment ? load(slot.v, kDtype<T>, offset, count, v_block) : nullptr;
    T* g = load(slot.g, slot.g_type, offset, count, g_block);
    for (int j = 0; j < momenta; ++j) u[j] = load(slot_u[j], kDtype<T>, offset, count, u_block[j]);
    if (!raw) {
#pragma omp simd
      for (int e = 0; e < kBlock; ++e) g_block.at[e] = prepared(c, scale, g[e]);
      g = g_block.at;
    }

    if constexpr (N > 0) {
      update_run<Law, N>(c, run * kBlock, x, g, u, v);
    } else {
      update_block<Law>(c, x, g, u, v);
    }

    store(x, slot.x, slot.x_type, offset, count);
    if (Law::kSecondMoment) store(v, slot.v, kDtype<T>, offset, count);
    for (int j = 0; j < momenta; ++j) store(u[j], slot_u[j], kDtype<T>, offset, count);
    if (slot.copy) store(x, slot.copy, slot.copy_type, offset, count);
  }
}

template <class Law, typename T>
void update_by_count(const Task<T>& task, int64_t begin, int64_t end) {
  switch (task.hyper.momenta) {
    case 1: return update<Law, 1>(task, begin, end);
    case 2: return update<Law, 2>(task, begin, end);
    case 3: return update<Law, 3>(task, begin, end);
    case 4: return update<Law, 4>(task, begin, end);
    default: return update<Law, 0>(task, begin, end);
  }
}

template <typename T>
void update_by_rule(const Task<T>& task, int64_t begin, int64_t end) {
  switch (task.hyper.rule) {
    case Rule::kSgdm: return update_by_count<Sgdm>(task, begin, end);
    case Rule::kAdam: return update_by_count<Adam>(task, begin, end);
    case Rule::kAdopt: return update_by_count<Adopt>(task, begin, end);
    case Rule::kAdoptStart: return update<AdoptStart, 0>(task, begin, end);
  }
}

}  // namespace

void update_blocks(const Task<float>& task, int64_t begin, int64_t end) { update_by_rule(task, begin, end); }
void update_blocks(const Task<double>& task, int64_t begin, int64_t end) { update_by_rule(task, begin, end); }

}  // namespace deslo::DESLO_ISA
