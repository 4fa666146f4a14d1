// The CUDA kernel of deslo::fingerprint: many tensors in one launch, every thread with a sum of its own, and no
// atomics.
//
// tests/emulation lets a C++ compiler build this file for machines without a GPU.
#include "access.cuh"
#include "kernels.h"

namespace deslo {
namespace {

constexpr int kPass = kThreads * 16;  // bytes that the threads of a block read at once
constexpr int kPasses = int(kBlockBytes / kPass);
static_assert(kBlockBytes % kPass == 0, "a block is whole passes");

struct FingerprintBatch {
  static constexpr int kSpans = (kArguments - 64) / int(sizeof(Span));

  uint64_t* sums;
  int64_t begin, end;  // blocks
  int span_count;
  Span spans[kSpans];
};

// The first `count` of 16 bytes, all multiples of the size of T, in words; the others are 0.
template <typename T>
__device__ __forceinline__ void read_pieces(const char* from, int64_t count, Raw& raw) {
  constexpr int kPerWord = 4 / int(sizeof(T));
  for (int p = 0; p < 4 * kPerWord; ++p) {
    if (p * int64_t(sizeof(T)) >= count) break;
    const uint32_t piece = reinterpret_cast<const T*>(from)[p];
    raw.words[p / kPerWord] |= piece << (8 * sizeof(T) * (p % kPerWord));
  }
}

// For a block that is incomplete or not aligned for words.
__device__ __forceinline__ Raw read_slowly(const char* from, int64_t count) {
  Raw raw{};
  const uint64_t alignment = reinterpret_cast<uintptr_t>(from) | uint64_t(count < 16 ? count : 16);
  if (count >= 16 && alignment % 16 == 0) {
    load_vector<uint4>(from, &raw);
  } else if (alignment % 4 == 0) {
    read_pieces<uint32_t>(from, count, raw);
  } else if (alignment % 2 == 0) {
    read_pieces<uint16_t>(from, count, raw);
  } else {
    read_pieces<uint8_t>(from, count, raw);
  }
  return raw;
}

// Sums four words of a block, each times its weight. Computing a weight is cheaper than loading it.
__device__ __forceinline__ uint64_t sum_weighted_words(const Raw& raw, int column, uint32_t flipped) {
  uint64_t sum = 0;
  for (int e = 0; e < 4; ++e) sum += apply_weight(raw.words[e], column_weight(column + e) ^ flipped);
  return sum;
}

__global__ void __launch_bounds__(kThreads) fingerprint_sums(const __grid_constant__ FingerprintBatch batch) {
  const int thread_offset = int(threadIdx.x) * 16;  // bytes, into each pass
  uint64_t total = 0;
  for (int64_t block = batch.begin + blockIdx.x; block < batch.end; block += gridDim.x) {
    const Span& span = batch.spans[find_slot(batch.spans, batch.span_count, block)];
    const int64_t offset = (block - span.first_block) * kBlockBytes;
    const char* const from = static_cast<const char*>(span.data) + offset + thread_offset;
    const uintptr_t address = reinterpret_cast<uintptr_t>(span.data);
    const BlockWeight weight = block_weight(block);
    uint64_t sum = 0;
    if (span.bytes - offset >= kBlockBytes && address % 4 == 0) {
      Raw raw[kPasses] = {};  // all loads are in flight before the first is waited for
      if (address % 16 == 0) {
        for (int p = 0; p < kPasses; ++p) load_vector<uint4>(from + p * kPass, &raw[p]);
      } else {
        for (int p = 0; p < kPasses; ++p) read_pieces<uint32_t>(from + p * kPass, 16, raw[p]);
      }
      for (int p = 0; p < kPasses; ++p)
        sum += sum_weighted_words(raw[p], (p * kPass + thread_offset) / 4, weight.flipped);
    } else {
#pragma unroll 1
      for (int at = thread_offset; at < kBlockBytes && at < span.bytes - offset; at += kPass) {
        const Raw raw = read_slowly(from + (at - thread_offset), span.bytes - offset - at);
        sum += sum_weighted_words(raw, at / 4, weight.flipped);
      }
    }
    total += sum * weight.factor;
  }
  batch.sums[int64_t(blockIdx.x) * kThreads + threadIdx.x] += total;
}

int64_t grid_size(int64_t blocks, int device) {
  const int64_t resident = count_resident_blocks(fingerprint_sums, device);
  return blocks < resident ? blocks : resident;
}

}  // namespace

int64_t fingerprint_columns(const FingerprintTask& task, int device) {
  return grid_size(task.blocks, device) * kThreads;
}

void fingerprint_cuda(const FingerprintTask& task, int device, void* stream, uint64_t* sums) {
  FingerprintBatch batch{};
  batch.sums = sums;
  for (int64_t begin = 0; begin < task.count; begin += batch.span_count) {
    const int64_t left = task.count - begin;
    batch.span_count = int(left < FingerprintBatch::kSpans ? left : FingerprintBatch::kSpans);
    for (int i = 0; i < batch.span_count; ++i) batch.spans[i] = task.spans[begin + i];
    batch.begin = batch.end;
    batch.end = left > batch.span_count ? task.spans[begin + batch.span_count].first_block : task.blocks;
    const int64_t grid = grid_size(batch.end - batch.begin, device);
    queue_kernel(fingerprint_sums, grid, kThreads, static_cast<cudaStream_t>(stream), batch);
  }
}

}  // namespace deslo
