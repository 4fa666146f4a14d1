// The CUDA kernel of deslo::land_: many states in one launch, one pass over each.
//
// tests/emulation lets a C++ compiler build this file for machines without a GPU.
#include "access.cuh"
#include "kernels.h"

namespace deslo {
namespace {

// first_block of a landing counts chunks here: kThreads accesses of kAtOnce elements.
struct LandBatch {
  static constexpr int kLandings = (kArguments - 64) / int(sizeof(Landing));

  double factor;
  int64_t chunks;
  int landing_count;
  Landing landings[kLandings];
};

template <typename X, typename T>
__device__ __forceinline__ void land_elements(T factor, const Landing& landing, int64_t offset, int count, bool whole) {
  const Elements x_raw = load_elements(landing.x, landing.x_type, offset, count, whole);
  const Elements local_raw = load_elements(landing.local, landing.mean_type, offset, count, whole);
  const Elements mean_raw = load_elements(landing.mean, landing.mean_type, offset, count, whole);
  X x[kAtOnce];
  T local[kAtOnce], mean[kAtOnce];
  widen(x_raw, landing.x_type, x);
  widen(local_raw, landing.mean_type, local);
  widen(mean_raw, landing.mean_type, mean);
  for (int e = 0; e < kAtOnce; ++e) land(factor, x[e], local[e], mean[e]);
  for (int e = 0; e < kAtOnce; e += kWidth<X>) {
    X values[kWidth<X>];
    memcpy(values, x + e, sizeof values);
    store(values, landing.x, landing.x_type, offset + e, count - e, whole);
  }
}

__global__ void __launch_bounds__(kThreads) land_means(const __grid_constant__ LandBatch batch) {
  for (int64_t chunk = blockIdx.x; chunk < batch.chunks; chunk += gridDim.x) {
    const Landing& landing = batch.landings[find_slot(batch.landings, batch.landing_count, chunk)];
    const int64_t offset = ((chunk - landing.first_block) * kThreads + threadIdx.x) * kAtOnce;
    const int64_t left = landing.numel - offset;
    if (left <= 0) continue;
    const int count = left < kAtOnce ? int(left) : kAtOnce;
    const bool whole = count == kAtOnce && is_aligned(landing.x, landing.x_type) &&
                       is_aligned(landing.local, landing.mean_type) && is_aligned(landing.mean, landing.mean_type);
    if (landing.mean_type == Dtype::kFloat32) {
      land_elements<float>(float(batch.factor), landing, offset, count, whole);
    } else if (landing.x_type == Dtype::kFloat64) {
      land_elements<double>(batch.factor, landing, offset, count, whole);
    } else {
      land_elements<float>(batch.factor, landing, offset, count, whole);
    }
  }
}

}  // namespace

void land_cuda(const LandTask& task, int device, void* stream) {
  constexpr int64_t chunk = kThreads * kAtOnce;
  const int64_t resident = count_resident_blocks(land_means, device);
  LandBatch batch{};
  batch.factor = task.factor;
  for (int64_t begin = 0; begin < task.count; begin += batch.landing_count) {
    const int64_t left = task.count - begin;
    batch.landing_count = int(left < LandBatch::kLandings ? left : LandBatch::kLandings);
    batch.chunks = 0;
    for (int i = 0; i < batch.landing_count; ++i) {
      batch.landings[i] = task.landings[begin + i];
      batch.landings[i].first_block = batch.chunks;
      batch.chunks += (batch.landings[i].numel + chunk - 1) / chunk;
    }
    queue_kernel(land_means, batch.chunks < resident ? batch.chunks : resident, kThreads,
                 static_cast<cudaStream_t>(stream), batch);
  }
}

}  // namespace deslo
