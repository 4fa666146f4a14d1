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

// Asks for the lines of the block four blocks ahead, to be written. Past the end of a tensor it is only a hint.
DESLO_INLINE void fetch(void* data, int64_t offset, int64_t element) {
  char* const ahead = static_cast<char*>(data) + (offset + 4 * kBlock) * element;
  for (int64_t byte = 0; byte < kBlock * element; byte += 64) __builtin_prefetch(ahead + byte, 1);
}

// Blocks begin..end of a task, one after the other: each is read once and written once.
template <class Law, int N, typename T>
void update(const Task<T>& task, int64_t begin, int64_t end) {
  const Constants<T> c = constants<T>(task.hyper);
  const int momenta = N ? N : c.momenta;
  const T scale = task.grad_scale ? T(*task.grad_scale) : T(1);
  const bool raw = scale == T(1) && !(c.clip_value > T(0));
  const FlushSubnormals flush;
  // what lies beyond the end of a tensor is computed too, on zeros, and not stored
  Block<T> x_block{}, g_block{}, v_block{}, z, d, u_block{};

  int64_t index = slot_of(task.slots, task.slot_count, begin);
  for (int64_t block = begin; block < end; ++block) {
    while (index + 1 < task.slot_count && task.slots[index + 1].first_block <= block) ++index;
    const Slot<T>& slot = task.slots[index];
    T* const* const slot_u = task.u + index * momenta;
    const int64_t offset = (block - slot.first_block) * kBlock;
    const int64_t left = slot.numel - offset, count = left < kBlock ? left : kBlock;

    fetch(slot.x, offset, slot.x_type == kDtype<T> ? sizeof(T) : 2);
    T* const x = load(slot.x, slot.x_type, offset, count, x_block);
    T* g = load(slot.g, slot.g_type, offset, count, g_block);
    T* v = nullptr;
    if constexpr (Law::kSecondMoment) {
      fetch(slot.v, offset, sizeof(T));
      v = load(slot.v, kDtype<T>, offset, count, v_block);
    }
    if (!raw) {
      prepare<kBlock>(c, scale, g, g_block.at);
      g = g_block.at;
    }

    start<Law, kBlock>(c, g, v, z.at, d.at);
    for (int j = 0; j < momenta; ++j) {
      fetch(slot_u[j], offset, sizeof(T));
      T* const u = load(slot_u[j], kDtype<T>, offset, count, u_block);
      follow<kBlock>(c, j, z.at, u, d.at);
      store(u, slot_u[j], kDtype<T>, offset, count);
    }
    finish<Law, kBlock>(c, x, d.at, g, v);

    store(x, slot.x, slot.x_type, offset, count);
    if (Law::kSecondMoment) store(v, slot.v, kDtype<T>, offset, count);
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
