// What the CPU kernels share: whole blocks of elements, widened and narrowed where a tensor has another format.
//
// Everything here is inlined or in the namespace of the instruction set: a function shared with another object file could
// end up compiled for instructions that the machine lacks.
#pragma once

#include "kernels.h"

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

// `count` elements, where they lie if they are a whole block, else in `block`.
template <typename T>
DESLO_INLINE T* reach(T* data, int64_t count, Block<T>& block) {
  if (count == kBlock) return data;
  memcpy(block.at, data, count * sizeof(T));
  return block.at;
}

// Brings `from` to its place, if it is not there already.
template <typename T>
DESLO_INLINE void put(const T* from, T* place, int64_t count) {
  if (place != from) memcpy(place, from, count * sizeof(T));
}

// The same for elements that may have another format in memory: at `offset`, as T.
template <typename T>
DESLO_INLINE T* load(void* data, Dtype type, int64_t offset, int64_t count, Block<T>& block) {
  if (type == Dtype::kBFloat16) {
    widen(static_cast<BFloat16*>(data) + offset, count, block.at);
  } else if (type == Dtype::kFloat16) {
    widen(static_cast<Float16*>(data) + offset, count, block.at);
  } else {
    return reach(static_cast<T*>(data) + offset, count, block);
  }
  return block.at;
}

template <typename T>
DESLO_INLINE void store(const T* from, void* data, Dtype type, int64_t offset, int64_t count) {
  if (type == Dtype::kBFloat16) {
    narrow(from, count, static_cast<BFloat16*>(data) + offset);
  } else if (type == Dtype::kFloat16) {
    narrow(from, count, static_cast<Float16*>(data) + offset);
  } else {
    put(from, static_cast<T*>(data) + offset, count);
  }
}

}  // namespace
}  // namespace deslo::DESLO_ISA
