// The CPU kernels. setup.py compiles this file once per instruction set, with DESLO_ISA as its name; module.cpp chooses.
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

// Lane k of a block's sums gathers the elements k, k + kLanes, ...; at the end lanes are added one after the other. So the
// width of the registers changes no bit.
constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kWide = 8;
#elif defined(__AVX__)
constexpr int kWide = 4;
#else
constexpr int kWide = 2;
#endif

template <typename T>
struct Wide {
  typedef T Type __attribute__((vector_size(kWide * sizeof(T))));
};
using Doubles = Wide<double>::Type;

struct DriftSums {
  Doubles distance[kLanes / kWide], product[kLanes / kWide], square[kLanes / kWide];
};

template <typename T>
DESLO_INLINE Doubles doubles(const T* from) {
  typename Wide<T>::Type some;
  memcpy(&some, from, sizeof some);
  return __builtin_convertvector(some, Doubles);
}

// `length` is a multiple of kLanes. The copy of the sums stays in registers.
template <typename L, typename M>
DESLO_INLINE void drift_run(int64_t length, const L* local, const M* mean, DriftSums& sums) {
  DriftSums s = sums;
  for (int64_t e = 0; e < length; e += kLanes) {
#pragma GCC unroll 8
    for (int p = 0; p < kLanes / kWide; ++p) {
      const int64_t at = e + p * kWide;
      add_drift(doubles(local + at), doubles(mean + at), s.distance[p], s.product[p], s.square[p]);
    }
  }
  sums = s;
}

DESLO_INLINE double added(const Doubles* lanes) {
  double sum = 0;
  for (int k = 0; k < kLanes; ++k) sum += lanes[k / kWide][k % kWide];
  return sum;
}

// `count` elements from `offset`, a block or what is left of the tensor. L is float for the 16-bit formats too.
template <typename L, typename M>
void drift_block(const Pair& pair, int64_t offset, int64_t count, double* to) {
  DriftSums sums{};
  const int64_t in_place = pair.local_type == kDtype<L> ? count / kBlock * kBlock : 0;
  drift_run(in_place, static_cast<L*>(pair.local) + offset, static_cast<M*>(pair.mean) + offset, sums);
  Block<L> l_block{};
  Block<M> m_block{};
  for (int64_t e = in_place; e < count; e += kBlock) {
    const int64_t left = count - e < kBlock ? count - e : kBlock;
    if (left < kBlock) l_block = {}, m_block = {};  // zeros add nothing
    const L* const l = load(pair.local, pair.local_type, offset + e, left, l_block);
    const M* const m = load(pair.mean, kDtype<M>, offset + e, left, m_block);
    drift_run(kBlock, l, m, sums);
  }
  to[0] = added(sums.distance);
  to[1] = added(sums.product);
  to[2] = added(sums.square);
}

template <typename M>
void drift_block(const Pair& pair, int64_t offset, int64_t count, double* to) {
  if (pair.local_type == Dtype::kFloat64) return drift_block<double, M>(pair, offset, count, to);
  drift_block<float, M>(pair, offset, count, to);
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

void drift_blocks(const DriftTask& task, int64_t begin, int64_t end, double* sums) {
  const FlushSubnormals flush;
  int64_t index = slot_of(task.pairs, task.pair_count, begin);
  for (int64_t block = begin; block < end; ++block, sums += kSums) {
    while (index + 1 < task.pair_count && task.pairs[index + 1].first_block <= block) ++index;
    const Pair& pair = task.pairs[index];
    const int64_t offset = (block - pair.first_block) * kDriftBlock, left = pair.numel - offset;
    const int64_t count = left < kDriftBlock ? left : kDriftBlock;
    if (pair.mean_type == Dtype::kFloat64) {
      drift_block<double>(pair, offset, count, sums);
    } else {
      drift_block<float>(pair, offset, count, sums);
    }
  }
}

}  // namespace deslo::DESLO_ISA
