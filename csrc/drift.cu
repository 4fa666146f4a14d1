// The CUDA kernel of deslo::drift: many pairs in one launch, every thread with sums of its own, and no atomics.
//
// tests/emulation lets a C++ compiler build this file for machines without a GPU.
#include "access.cuh"
#include "cuda.h"

namespace deslo {
namespace {

constexpr int kAtOnce = 4;  // elements

// first_block of a pair counts chunks here: kThreads accesses of kAtOnce elements.
struct DriftBatch {
  static constexpr int kPairs = (kArguments - 64) / int(sizeof(Pair));

  double* sums;
  int64_t chunks;
  int pair_count;
  Pair pairs[kPairs];
};

// kAtOnce elements as they came; float64 takes both halves.
struct Elements {
  Raw raw[2];
};

// Those of the elements offset .. offset + kAtOnce that are among the first `count`; the others are 0.
__device__ __forceinline__ Elements read(const void* data, Dtype type, int64_t offset, int count, bool whole) {
  Elements elements{};
  if (type == Dtype::kFloat64) {
    elements.raw[0] = load<double>(data, type, offset, count, whole);
    elements.raw[1] = load<double>(data, type, offset + 2, count - 2, whole);
  } else {
    elements.raw[0] = load<float>(data, type, offset, count, whole);
  }
  return elements;
}

__device__ __forceinline__ void to_double(const Elements& elements, Dtype type, double* to) {
  if (type == Dtype::kFloat64) {
    memcpy(to, &elements, kAtOnce * sizeof(double));
    return;
  }
  float some[kAtOnce];
  widen(elements.raw[0], type, some);
  for (int e = 0; e < kAtOnce; ++e) to[e] = double(some[e]);
}

__global__ void __launch_bounds__(kThreads) drift_sums(const __grid_constant__ DriftBatch batch) {
  const int64_t columns = int64_t(gridDim.x) * kThreads;
  double* const mine = batch.sums + int64_t(blockIdx.x) * kThreads + threadIdx.x;
  double distance = 0, product = 0, square = 0;
  for (int64_t chunk = blockIdx.x; chunk < batch.chunks; chunk += gridDim.x) {
    const Pair& pair = batch.pairs[slot_of(batch.pairs, batch.pair_count, chunk)];
    const int64_t offset = ((chunk - pair.first_block) * kThreads + threadIdx.x) * kAtOnce;
    const int64_t left = pair.numel - offset;
    if (left <= 0) continue;
    const int count = left < kAtOnce ? int(left) : kAtOnce;
    const bool whole = count == kAtOnce && aligned(pair.local, pair.local_type) && aligned(pair.mean, pair.mean_type);
    const Elements local = read(pair.local, pair.local_type, offset, count, whole);
    const Elements mean = read(pair.mean, pair.mean_type, offset, count, whole);
    double l[kAtOnce], m[kAtOnce];
    to_double(local, pair.local_type, l);
    to_double(mean, pair.mean_type, m);
    for (int e = 0; e < kAtOnce; ++e) add_drift(l[e], m[e], distance, product, square);
  }
  mine[0] += distance;
  mine[columns] += product;
  mine[2 * columns] += square;
}

// Thread blocks that the device holds at once.
int64_t drift_room(int device) {
  int processors = 0, resident = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, drift_sums, kThreads, 0));
  return int64_t(processors) * resident;
}

}  // namespace

int64_t drift_columns(int device) {
  const OnDevice guard(device);
  return drift_room(device) * kThreads;
}

void drift_cuda(const DriftTask& task, int device, void* stream, double* sums) {
  const OnDevice guard(device);
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
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(drift_room(device)));  // every launch adds to the same columns
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, drift_sums, batch));
  }
}

}  // namespace deslo
