// Values as few bits: how a block of them becomes a record, how a record is read, and the arguments of the kernels.
// deslo_plugin/kernels/quantize.py defines formats and operators.
#pragma once

#include "update.h"

namespace deslo {

constexpr int kRecordBlock = 128;  // elements of a record; no block spans two tensors
constexpr float kTinyScale = 0x1p-100f;
constexpr int32_t kInfinity = 0x7f800000;

// A record is the scale, in kScaleBytes, and a code of kBits for each element. kLevels is the largest code.
template <int bits, int levels, bool rooted>
struct RecordFormat {
  static constexpr int kBits = bits, kLevels = levels;
  static constexpr bool kRooted = rooted;
  static constexpr int kScaleBytes = bits == 16 ? 0 : 4;  // bfloat16 has a scale in every element
  static constexpr int kRecordBytes = kScaleBytes + kRecordBlock * bits / 8;
};

// Calls run(format) with the format of that number; none has another.
template <typename Run>
inline void with_format(int64_t number, Run run) {
  switch (number) {
    case 0: return run(RecordFormat<16, 0, false>{});
    case 1: return run(RecordFormat<8, 448, false>{});
    case 2: return run(RecordFormat<8, 127, false>{});
    case 3: return run(RecordFormat<4, 7, false>{});
    case 4: return run(RecordFormat<8, 448, true>{});
    case 5: return run(RecordFormat<8, 255, true>{});
    case 6: return run(RecordFormat<4, 15, true>{});
  }
}

// Elements are compared by this number, as integers: the magnitude of one that is kept, not above 0 for one that is
// taken for zero, kInfinity or more for one that is not finite.
template <class Format>
DESLO_INLINE int32_t magnitude(float y) {
  const int32_t bits = int32_t(bits_of(y)), size = bits & 0x7fffffff;
  return !Format::kRooted || size >= kInfinity ? size : bits;
}

// What the elements of a block have in common. `inverse` is 1 / scale, with one rounding.
struct Scale {
  float scale, inverse;
};

// `largest` is the largest magnitude of a block, at least 0. The elements of a block that is not finite are to be put
// to zero.
template <class Format>
DESLO_INLINE Scale make_scale(int32_t largest) {
  if (largest >= kInfinity) return {float_of(0x7fc00000u), 0.0f};
  const float a = float_of(uint32_t(largest)), x = Format::kRooted ? square_root(a) : a;
  const float scale = x / float(Format::kLevels);
  if (!(scale >= kTinyScale)) return {0.0f, 0.0f};
  return {scale, float(Format::kLevels) / x};
}

// The nearest e4m3 to |x| < 464, half-way cases to even. Additions round: to 3 bits behind the leading one, and below
// 2^-6 to multiples of 2^-9.
DESLO_INLINE uint32_t make_e4m3(float x) {
  const uint32_t bits = bits_of(x), size = bits & 0x7fffffffu;
  const uint32_t normal = (size - (120u << 23) + 0x7ffffu + ((size >> 20) & 1u)) >> 20;
  const uint32_t subnormal = bits_of(float_of(size) + 0x1p14f) - (141u << 23);
  return (float_of(size) < 0x1p-6f ? subnormal : normal) | ((bits >> 24) & 0x80u);
}

DESLO_INLINE float read_e4m3(uint32_t code) {
  const uint32_t size = (code & 0x7fu) << 20;
  const uint32_t normal = size + (120u << 23);
  const uint32_t subnormal = bits_of(float_of(size + (121u << 23)) - 0x1p-6f);
  const uint32_t number = size < (1u << 23) ? subnormal : normal;
  return float_of((size == 0x7f00000u ? 0x7fc00000u : number) | ((code & 0x80u) << 24));
}

// The integer nearest to |x| < 2^22, half-way cases to even, modulo 2^9: the low bits of 1.5 * 2^23 + x.
DESLO_INLINE uint32_t round_to_integer(float x) { return bits_of(x + 0x1.8p23f) & 0x1ffu; }

// The code of a finite y.
template <class Format>
DESLO_INLINE uint32_t make_code(float y, float inverse) {
  if constexpr (Format::kBits == 16) {
    return BFloat16::from_float(y).bits;
  } else if constexpr (Format::kRooted) {
    const int32_t bits = int32_t(bits_of(y)), positive = bits > 0 ? bits : 0;
    const float x = square_root(float_of(uint32_t(positive))) * inverse;
    const int32_t code = int32_t(Format::kLevels == 448 ? make_e4m3(x) : round_to_integer(x));
    const int32_t least = int32_t((0u - uint32_t(positive)) >> 31);  // 1 above zero
    return uint32_t(code > least ? code : least);
  } else if constexpr (Format::kLevels == 448) {
    return make_e4m3(y * inverse);
  } else {
    const uint32_t code = round_to_integer(y * inverse);
    return Format::kBits == 4 ? (code + 8) & 15u : code & 0xffu;
  }
}

template <class Format>
DESLO_INLINE float read_code(uint32_t code, float scale) {
  if constexpr (Format::kBits == 16) {
    return float_of(code << 16);
  } else {
    float x;
    if constexpr (Format::kLevels == 448) {
      x = read_e4m3(code);
    } else if constexpr (Format::kRooted) {
      x = float(int32_t(code));
    } else {
      x = float(Format::kBits == 4 ? int32_t(code) - 8 : int32_t(int8_t(code)));
    }
    x *= scale;
    return Format::kRooted ? x * x : x;
  }
}

// y of an element. What is missing changes nothing: a base is 0 then, an error kNoError.
constexpr float kNoError = -0.0f;  // x + 0 would be 0 for x = -0

DESLO_INLINE float difference(float value, float base, float error) { return value - base + error; }

// One tensor. base and error may be null; mean is null for quantize, value and error are for dequantize.
struct RecordSlot {
  const void* value;
  float* base;
  float* error;
  float* mean;
  int64_t numel;
  int64_t first_block;
  Dtype value_type;
};

// The blocks of all tensors, and the records of one format.
struct RecordTask {
  const RecordSlot* slots;
  int64_t count;
  int64_t blocks;
  int64_t format;
};

// Records behind those of the tensors are zeros, `rows` in all. own has own_rows blocks from `first` on.
struct QuantizeTask : RecordTask {
  int64_t rows;
  uint8_t* records;
  float* own;
  int64_t first, own_rows;
};

// received[j] is `blocks` records of replica j, and what `rank` holds is own.
struct MeanTask {
  int64_t format, blocks, replicas, rank;
  const uint8_t* received;
  const float* weights;
  float* own;
  uint8_t* records;
};

struct DequantizeTask : RecordTask {
  const uint8_t* records;
};

// sent is parts of replicas of `part` records; own has the blocks of `rank` among them.
struct CarryTask : RecordTask {
  const uint8_t* sent;
  const float* own;
  int64_t replicas, part, rank;

  // Those of `block`, if its mean was taken here; else null.
  DESLO_INLINE const float* find_own(int64_t block) const {
    const int64_t row = block / part;
    if (row % replicas != rank) return nullptr;
    return own + (row / replicas * part + block % part) * kRecordBlock;
  }
};

// What a mean lost, as what a replica of that weight would have had to send more.
DESLO_INLINE float residual(float mean, float said, float weight) {
  return weight > 0.0f ? (mean - said) / weight : 0.0f;
}

}  // namespace deslo
