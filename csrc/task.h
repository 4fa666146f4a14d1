// What the kernels are given: plain pointers and numbers, checked by launch.h; and the 16-bit number formats.
#pragma once

#include <stdint.h>
#include <string.h>

#include "rules.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace deslo {

enum class Dtype : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

template <typename T>
constexpr Dtype kDtype = sizeof(T) == sizeof(float) ? Dtype::kFloat32 : Dtype::kFloat64;

constexpr int kBlock = 64;  // elements; no block spans two tensors

// One parameter, its gradient (never written) and second momentum. v is null for sgdm, copy where none is asked for.
template <typename T>
struct Slot {
  void* x;
  void* g;
  T* v;
  void* copy;
  int64_t numel;
  int64_t first_block;
  Dtype x_type, g_type, copy_type;
};

// One call of one rule on tensors whose states have type T.
template <typename T>
struct Task {
  Hyper hyper;
  const Slot<T>* slots;
  T* const* u;  // u[slot * momenta + j]
  int64_t slot_count;
  int64_t blocks;
  const float* grad_scale;  // on the tensors' device; null: 1
  const float* found_inf;   // likewise; not 0: nothing is written
};

// The one of `count` slots that holds a block.
template <typename S>
DESLO_INLINE int64_t slot_of(const S* slots, int64_t count, int64_t block) {
  int64_t low = 0;
  while (count > 1) {
    const int64_t half = count / 2;
    low = slots[low + half].first_block <= block ? low + half : low;
    count -= half;
  }
  return low;
}

DESLO_INLINE uint32_t bits_of(float a) {
  uint32_t bits;
  memcpy(&bits, &a, sizeof bits);
  return bits;
}

DESLO_INLINE float float_of(uint32_t bits) {
  float a;
  memcpy(&a, &bits, sizeof a);
  return a;
}

// bfloat16 and IEEE half as bits; to_float is exact, of_float rounds to nearest, ties to even.
struct BFloat16 {
  uint16_t bits;

  DESLO_INLINE float to_float() const { return float_of(uint32_t(bits) << 16); }

  static DESLO_INLINE BFloat16 of_float(float a) {
    const uint32_t b = bits_of(a);
    const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return {uint16_t(a != a ? 0x7fc0u : rounded)};
  }
};

struct Float16 {
  uint16_t bits;

  DESLO_INLINE float to_float() const {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16, magnitude = uint32_t(bits & 0x7fffu) << 13;
    // the exponent's bias goes from 15 to 127, and the largest exponent stays the largest
    const uint32_t normal = magnitude + ((magnitude >= 0x0f800000u ? 224u : 112u) << 23);
    // a subnormal half is a small integer times 2^-24: put it below 2^-14's leading one and take that away
    const uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
    return float_of(sign | (magnitude < 0x00800000u ? subnormal : normal));
#endif
  }

  static DESLO_INLINE Float16 of_float(float a) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(a))};
#else
    const uint32_t b = bits_of(a), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // below 2^-14, adding 0.5 lets the addition itself round to multiples of 2^-24
    const uint32_t subnormal = bits_of(float_of(magnitude < 0x38800000u ? magnitude : 0u) + 0.5f) - 0x3f000000u;
    const uint32_t huge = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN, or from 65520 upwards infinity
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    return {uint16_t(sign | (magnitude >= 0x477ff000u ? huge : finite))};
#endif
  }
};

}  // namespace deslo
