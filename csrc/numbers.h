// Formats of numbers in memory, their conversions, and how a result is rounded to a state.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DESLO_INLINE __host__ __device__ __forceinline__
#else
#define DESLO_INLINE inline __attribute__((always_inline))
#endif

namespace deslo {

constexpr int kMaxMomenta = 16;

enum class Dtype : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

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

// bfloat16 and IEEE half as bits; to_float is exact, from_float rounds to nearest, ties to even.
struct BFloat16 {
  uint16_t bits;

  DESLO_INLINE float to_float() const { return float_of(uint32_t(bits) << 16); }

  static DESLO_INLINE BFloat16 from_float(float a) {
    const uint32_t b = bits_of(a);
    const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return {uint16_t(a != a ? 0x7fc0u : rounded)};
  }

  // Up with the probability of what is cut off, if the 16 bits of `noise` are uniform.
  static DESLO_INLINE BFloat16 from_float(float a, uint32_t noise) {
    return {uint16_t(a != a ? 0x7fc0u : (bits_of(a) + noise) >> 16)};
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

  static DESLO_INLINE Float16 from_float(float a) {
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

template <typename S>
inline constexpr Dtype kDtype = Dtype::kFloat32;
template <>
inline constexpr Dtype kDtype<double> = Dtype::kFloat64;
template <>
inline constexpr Dtype kDtype<BFloat16> = Dtype::kBFloat16;

// The type of the arithmetic on states of type S.
template <typename S>
struct Computed {
  using Type = S;
};
template <>
struct Computed<BFloat16> {
  using Type = float;
};
template <typename S>
using Arithmetic = typename Computed<S>::Type;

DESLO_INLINE float to_arithmetic(float a) { return a; }
DESLO_INLINE double to_arithmetic(double a) { return a; }
DESLO_INLINE float to_arithmetic(BFloat16 a) { return a.to_float(); }

// How the new value of a state is stored. `state` is 0 for v and j for u_j, `index` counts the elements of its tensor
// in memory.
template <typename S>
struct Rounding {
  DESLO_INLINE S round_state(S a, int, uint32_t) const { return a; }
};

// bfloat16 keeps 8 bits of a moving average that changes by less than that: rounded to nearest it would stand still. So
// it is rounded at random, by a hash of (t, state, index): no seed, nothing that depends on threads, on the instruction
// set or on the shape of a launch. deslo_plugin/algorithm/stochastic_rounding.py draws the same numbers.
template <>
struct Rounding<BFloat16> {
  struct Key {
    uint32_t first, second;
  };
  Key keys[1 + kMaxMomenta];

  // SplitMix64 of (t, state)
  static DESLO_INLINE Key make_key(int64_t t, int state) {
    uint64_t z = (uint64_t(t) * 32 + uint64_t(state) + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return {uint32_t(z), uint32_t(z >> 32)};
  }

  // 16 bits; the multipliers are those of lowbias32
  static DESLO_INLINE uint32_t draw_noise(Key key, uint32_t index) {
    uint32_t h = index ^ key.first;
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h ^= key.second;
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    return h >> 16;
  }

  DESLO_INLINE BFloat16 round_state(float a, int state, uint32_t index) const {
    return BFloat16::from_float(a, draw_noise(keys[state], index));
  }
};

}  // namespace deslo
