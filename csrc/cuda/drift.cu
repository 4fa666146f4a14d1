// The CUDA kernel of deslo::drift: many pairs in one launch, every thread with sums of its own, and no atomics.
//
// tests/emulation lets a C++ compiler build this file for machines without a GPU.
#include "access.cuh"
#include "kernels.h"

namespace deslo {
namespace {

// first_block of a pair counts chunks here: kThreads accesses of kAtOnce elements.
struct DriftBatch {
  static constexpr int kPairs = (kArguments - 64) / int(sizeof(Pair));

  double* sums;
  int64_t chunks;
  int pair_count;
  Pair pairs[kPairs];
};

__global__ void __launch_bounds__(kThreads) drift_sums(const __grid_constant__ DriftBatch batch) {
  const int64_t columns = int64_t(gridDim.x) * kThreads;
  double* const thread_sums = batch.sums + int64_t(blockIdx.x) * kThreads + threadIdx.x;
  double distance = 0, product = 0, square = 0;
  for (int64_t chunk = blockIdx.x; chunk < batch.chunks; chunk += gridDim.x) {
    const Pair& pair = batch.pairs[find_slot(batch.pairs, batch.pair_count, chunk)];
    const int64_t offset = ((chunk - pair.first_block) * kThreads + threadIdx.x) * kAtOnce;
    const int64_t left = pair.numel - offset;
    if (left <= 0) continue;
    const int count = left < kAtOnce ? int(left) : kAtOnce;
    const bool whole =
        count == kAtOnce && is_aligned(pair.local, pair.local_type) && is_aligned(pair.mean, pair.mean_type);
    const Elements local = load_elements(pair.local, pair.local_type, offset, count, whole);
    const Elements mean = load_elements(pair.mean, pair.mean_type, offset, count, whole);
    double l[kAtOnce], m[kAtOnce];
    widen(local, pair.local_type, l);
    widen(mean, pair.mean_type, m);
    for (int e = 0; e < kAtOnce; ++e) add_drift(l[e], m[e], distance, product, square);
  }
  thread_sums[0] += distance;
  thread_sums[columns] += product;
  thread_sums[2 * columns] += square;
}

}  // namespace

int64_t drift_columns(int device) { return count_resident_blocks(drift_sums, device) * kThreads; }

void drift_cuda(const DriftTask& task, int device, void* stream, double* sums) {
  constexpr int64_t chunk = kThreads * kAtOnce;
  DriftBatch batch{};
  batch.sums = sums;
  for (int64_t begin = 0; begin < task.pair_count; begin += batch.pair_count) {
    const int64_t left = task.pair_count - begin;
    batch.pair_count = int(left < DriftBatch::kPairs ? left : DriftBatch::kPairs);
    batch.chunks = 0;
    for (int i = 0; i < batch.pair_count; ++i) {
      batch.pairs[i] = task.pairs[begin + i];
      batch.pairs[i].first_block = batch.chunks;
      batch.chunks += (batch.pairs[i].numel + chunk - 1) / chunk;
    }
    // every launch adds to the same columns, and so is of one size
    queue_kernel(drift_sums, count_resident_blocks(drift_sums, device), kThreads, static_cast<cudaStream_t>(stream),
                 batch);
  }
}

}  // namespace deslo
