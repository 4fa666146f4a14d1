// Whether tensors still hold the same bits: one number computed from them, and the arguments of its kernels.
//
// A tensor is words of 32 bits, in blocks of kColumns; zeros fill up its last one. Every word is multiplied by an odd
// number of its column and block, every block by an odd number of its own, and all is added up modulo 2^64. So a word
// that changes always shows, and neither order nor alignment changes a bit.
#pragma once

#include "update.h"

namespace deslo {

constexpr int64_t kColumns = 4096;  // words of a block; no block spans two tensors
constexpr int64_t kBlockBytes = 4 * kColumns;

// One tensor. It is not written.
struct Span {
  const void* data;
  int64_t bytes;
  int64_t first_block;
};

struct FingerprintTask {
  const Span* spans;
  int64_t count;
  int64_t blocks;
};

// A number without a pattern for each x: the finalizer of MurmurHash3, one to one.
DESLO_INLINE constexpr uint32_t mix_bits(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

DESLO_INLINE constexpr uint32_t column_weight(int64_t column) { return mix_bits(uint32_t(column) + 1) | 1; }

// `flipped` changes the column weights of a block, which stay odd; `factor` is the weight of their sum. Without
// `flipped` all blocks had the same column weights, and changes in the same columns of several blocks would cancel more
// often.
struct BlockWeight {
  uint32_t flipped;
  uint64_t factor;
};

DESLO_INLINE BlockWeight block_weight(int64_t block) {
  const uint32_t x = uint32_t(kColumns + 1 + 3 * block);
  return {mix_bits(x) & ~1u, (uint64_t(mix_bits(x + 1)) << 32 | mix_bits(x + 2)) | 1};
}

DESLO_INLINE uint64_t apply_weight(uint32_t word, uint32_t weight) {
  return uint64_t(int64_t(int32_t(word)) * int32_t(weight));
}

}  // namespace deslo
