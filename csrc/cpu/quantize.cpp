// The CPU kernels of few bits, built once per instruction set as update.cpp is. A block lies in the first cache while
// it is subtracted, scaled and coded.
#include "blocks.h"

namespace deslo::DESLO_ISA {
namespace {

struct Elements {
  alignas(64) float at[kRecordBlock];
};

constexpr Elements kZeros{};

struct NoErrors : Elements {
  constexpr NoErrors() : Elements() {
    for (float& error : at) error = kNoError;
  }
};

constexpr NoErrors kNoErrors;

DESLO_INLINE float widen(float a) { return a; }
DESLO_INLINE float widen(BFloat16 a) { return a.to_float(); }
DESLO_INLINE float widen(Float16 a) { return a.to_float(); }

// `count` elements of a tensor as a whole block: in place, or as a copy that is filled up with zeros.
template <typename T>
struct Padded {
  T at[kRecordBlock];

  DESLO_INLINE const T* fill(const T* from, int64_t count) {
    if (count == kRecordBlock) return from;
    memset(static_cast<void*>(at), 0, sizeof at);
    memcpy(at, from, count * sizeof(T));
    return at;
  }
};

template <typename T>
DESLO_INLINE void subtract(const RecordSlot& slot, int64_t offset, int64_t count, Elements& y) {
  Padded<T> values;
  Padded<float> bases, errors;
  const T* const value = values.fill(static_cast<const T*>(slot.value) + offset, count);
  const float* const base = slot.base ? bases.fill(slot.base + offset, count) : kZeros.at;
  const float* const error = slot.error ? errors.fill(slot.error + offset, count) : kNoErrors.at;
#pragma omp simd
  for (int e = 0; e < kRecordBlock; ++e) y.at[e] = difference(widen(value[e]), base[e], error[e]);
}

// y of `count` elements, and zeros behind them.
DESLO_INLINE void subtract(const RecordSlot& slot, int64_t offset, int64_t count, Elements& y) {
  switch (slot.value_type) {
    case Dtype::kBFloat16: return subtract<BFloat16>(slot, offset, count, y);
    case Dtype::kFloat16: return subtract<Float16>(slot, offset, count, y);
    default: return subtract<float>(slot, offset, count, y);
  }
}

// Not inlined: GCC makes no vectors of the square roots in this loop where it stands between the branches of encode.
template <class Format>
__attribute__((noinline)) void make_codes(const Elements& y, float inverse, uint8_t* codes) {
#pragma omp simd
  for (int e = 0; e < kRecordBlock; ++e) codes[e] = uint8_t(make_code<Format>(y.at[e], inverse));
}

// Writes the record of a block. One that is not finite loses its elements.
template <class Format>
DESLO_INLINE void encode(Elements& y, uint8_t* record) {
  if constexpr (Format::kBits == 16) {
    uint16_t codes[kRecordBlock];
#pragma omp simd
    for (int e = 0; e < kRecordBlock; ++e) codes[e] = uint16_t(make_code<Format>(y.at[e], 0.0f));
    memcpy(record, codes, sizeof codes);
  } else {
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int e = 0; e < kRecordBlock; ++e) {
      const int32_t size = magnitude<Format>(y.at[e]);
      largest = size > largest ? size : largest;
    }
    const Scale scale = make_scale<Format>(largest);
    if (largest >= kInfinity) y = {};
    alignas(64) uint8_t codes[kRecordBlock];
    make_codes<Format>(y, scale.inverse, codes);
    memcpy(record, &scale.scale, 4);
    if constexpr (Format::kBits == 8) {
      memcpy(record + 4, codes, sizeof codes);
    } else {  // the first of two in the lower half
#pragma omp simd
      for (int k = 0; k < kRecordBlock / 2; ++k) {
        uint16_t two;
        memcpy(&two, codes + 2 * k, 2);
        record[4 + k] = uint8_t(two | (two >> 4));
      }
    }
  }
}

// Calls use(e, what the record says of element e) for every element.
template <class Format, typename Use>
DESLO_INLINE void decode(const uint8_t* record, Use use) {
  if constexpr (Format::kBits == 16) {
#pragma omp simd
    for (int e = 0; e < kRecordBlock; ++e) {
      uint16_t code;
      memcpy(&code, record + 2 * e, 2);
      use(e, read_code<Format>(code, 0.0f));
    }
  } else {
    float scale;
    memcpy(&scale, record, 4);
    const uint8_t* codes = record + 4;
    alignas(64) uint8_t unpacked[kRecordBlock];
    if constexpr (Format::kBits == 4) {
#pragma omp simd
      for (int k = 0; k < kRecordBlock / 2; ++k) {
        const uint16_t two = uint16_t((codes[k] | codes[k] << 4) & 0x0f0f);
        memcpy(unpacked + 2 * k, &two, 2);
      }
      codes = unpacked;
    }
#pragma omp simd
    for (int e = 0; e < kRecordBlock; ++e) use(e, read_code<Format>(codes[e], scale));
  }
}

// Calls use(slot, offset, count, block) for the blocks begin..end: `count` elements of a slot from `offset`.
template <typename Use>
DESLO_INLINE void for_each_block(const RecordTask& task, int64_t begin, int64_t end, Use use) {
  int64_t index = find_slot(task.slots, task.count, begin);
  for (int64_t block = begin; block < end; ++block) {
    while (index + 1 < task.count && task.slots[index + 1].first_block <= block) ++index;
    const RecordSlot& slot = task.slots[index];
    const int64_t offset = (block - slot.first_block) * kRecordBlock, left = slot.numel - offset;
    use(slot, offset, left < kRecordBlock ? left : kRecordBlock, block);
  }
}

template <class Format>
void quantize(const QuantizeTask& task, int64_t begin, int64_t end) {
  const auto find_own = [&](int64_t block) {
    return block >= task.first && block - task.first < task.own_rows ? task.own + (block - task.first) * kRecordBlock
                                                                     : nullptr;
  };
  const int64_t filled = end < task.blocks ? end : task.blocks;
  for_each_block(task, begin, filled, [&](const RecordSlot& slot, int64_t offset, int64_t count, int64_t block) {
    Elements y;
    subtract(slot, offset, count, y);
    if (float* const own = find_own(block)) memcpy(own, y.at, sizeof y.at);
    encode<Format>(y, task.records + block * Format::kRecordBytes);
  });
  for (int64_t block = begin > filled ? begin : filled; block < end; ++block) {
    memset(task.records + block * Format::kRecordBytes, 0, Format::kRecordBytes);
    if (float* const own = find_own(block)) memset(own, 0, sizeof(Elements));
  }
}

template <class Format>
void take_mean(const MeanTask& task, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    float* const own = task.own + block * kRecordBlock;
    Elements mean{}, coded;
    for (int64_t j = 0; j < task.replicas; ++j) {
      const float weight = task.weights[j];
      if (j == task.rank) {
#pragma omp simd
        for (int e = 0; e < kRecordBlock; ++e) mean.at[e] += weight * own[e];
      } else {
        decode<Format>(task.received + (j * task.blocks + block) * Format::kRecordBytes,
                       [&](int e, float said) { mean.at[e] += weight * said; });
      }
    }
    uint8_t* const record = task.records + block * Format::kRecordBytes;
    coded = mean;
    encode<Format>(coded, record);
    const float weight = task.weights[task.rank];
    decode<Format>(record, [&](int e, float said) { own[e] = residual(mean.at[e], said, weight); });
  }
}

template <class Format>
void dequantize(const DequantizeTask& task, int64_t begin, int64_t end) {
  for_each_block(task, begin, end, [&](const RecordSlot& slot, int64_t offset, int64_t count, int64_t block) {
    const uint8_t* const record = task.records + block * Format::kRecordBytes;
    Padded<float> bases, means;
    const float* const base = slot.base ? bases.fill(slot.base + offset, count) : kNoErrors.at;
    float* const mean = count == kRecordBlock ? slot.mean + offset : means.at;
    decode<Format>(record, [&](int e, float said) { mean[e] = said + base[e]; });
    if (count < kRecordBlock) memcpy(slot.mean + offset, mean, count * sizeof(float));
  });
}

template <class Format>
void carry(const CarryTask& task, int64_t begin, int64_t end) {
  for_each_block(task, begin, end, [&](const RecordSlot& slot, int64_t offset, int64_t count, int64_t block) {
    if (slot.error) {
      Elements y;
      const float* lost = task.find_own(block);
      if (!lost) {
        subtract(slot, offset, count, y);
        decode<Format>(task.sent + block * Format::kRecordBytes, [&](int e, float said) { y.at[e] -= said; });
        lost = y.at;
      }
      memcpy(slot.error + offset, lost, count * sizeof(float));
    }
    if (slot.base && slot.mean) memcpy(slot.base + offset, slot.mean + offset, count * sizeof(float));
  });
}

}  // namespace

void record_blocks(const QuantizeTask& task, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  with_format(task.format, [&](auto format) { quantize<decltype(format)>(task, begin, end); });
}

void record_blocks(const MeanTask& task, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  with_format(task.format, [&](auto format) { take_mean<decltype(format)>(task, begin, end); });
}

void record_blocks(const DequantizeTask& task, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  with_format(task.format, [&](auto format) { dequantize<decltype(format)>(task, begin, end); });
}

void record_blocks(const CarryTask& task, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  with_format(task.format, [&](auto format) { carry<decltype(format)>(task, begin, end); });
}

}  // namespace deslo::DESLO_ISA
