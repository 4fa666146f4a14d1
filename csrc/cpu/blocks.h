// Shared by the CPU kernels, which work on whole blocks of elements and convert 16-bit formats block by block.
//
// Everything here is inlined or in the namespace of the instruction set: a function shared with another object file
// could end up compiled for instructions that the machine lacks.
#pragma once

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace deslo::DESLO_ISA {
namespace {

// Treats subnormal numbers as zero during its lifetime: momenta that decay to subnormals slow every later step tenfold.
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

// Not inlined: a call for each block of a 16-bit format keeps the kernels small.
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
    for (int e = 0; e < kBlock; ++e) to[e] = S::from_float(float(from[e]));
  } else {
    for (int64_t e = 0; e < count; ++e) to[e] = S::from_float(float(from[e]));
  }
}

// Returns `count` elements: in place if they are a whole block, else as a copy in `block`.
template <typename T>
DESLO_INLINE T* load_block(T* data, int64_t count, Block<T>& block) {
  if (count == kBlock) return data;
  memcpy(block.at, data, count * sizeof(T));
  return block.at;
}

// Copies the result back, unless load_block gave the memory of the tensor itself.
template <typename T>
DESLO_INLINE void store_block(const T* from, T* place, int64_t count) {
  if (place != from) memcpy(place, from, count * sizeof(T));
}

// As load_block and store_block, for a tensor whose format in memory may differ from T.
template <typename T>
DESLO_INLINE T* load(void* data, Dtype type, int64_t offset, int64_t count, Block<T>& block) {
  if (type == Dtype::kBFloat16) {
    widen(static_cast<BFloat16*>(data) + offset, count, block.at);
  } else if (type == Dtype::kFloat16) {
    widen(static_cast<Float16*>(data) + offset, count, block.at);
  } else {
    return load_block(static_cast<T*>(data) + offset, count, block);
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
    store_block(from, static_cast<T*>(data) + offset, count);
  }
}

}  // namespace
}  // namespace deslo::DESLO_ISA
