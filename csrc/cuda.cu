// The CUDA kernel of the rules: many tensors in one launch, 16-byte accesses, every load of an element in flight before
// its arithmetic.
//
// tests/emulation lets a C++ compiler build this file for machines without a GPU.
#include "access.cuh"
#include "cuda.h"

namespace deslo {
namespace {

// What one launch does. It travels by value, so there is no copy to the device to wait for and a CUDA graph can hold it.
// first_block of a slot counts chunks here: kThreads accesses of kWidth elements.
template <int N, typename S>
struct Batch {
  static constexpr int kMomenta = N ? N : kMaxMomenta;
  static constexpr int kSlots = (kArguments - int(sizeof(Recipe<S>))) / int(sizeof(Slot<S>) + kMomenta * sizeof(S*));

  Recipe<S> recipe;
  const float* grad_scale;
  const float* found_inf;
  int64_t chunks;
  int slot_count;
  Slot<S> slots[kSlots];
  S* u[kSlots * kMomenta];
};

// Whether every tensor of a slot begins where whole accesses may.
template <typename S>
__device__ __forceinline__ bool aligned(const Slot<S>& slot, S* const* u, int momenta) {
  bool all = aligned(slot.x, slot.x_type) && aligned(slot.g, slot.g_type) && aligned(slot.v, kDtype<S>) &&
             aligned(slot.copy, slot.copy_type);
  for (int j = 0; j < momenta; ++j) all = all && aligned(u[j], kDtype<S>);
  return all;
}

// New values of a state, 0 for v and 1 + j for u[j], to memory.
template <typename S, typename T>
__device__ __forceinline__ void store_state(
    const Recipe<S>& c, const T* from, S* data, int state, int64_t offset, int count, bool whole) {
  S some[kWidth<T>];
  for (int e = 0; e < kWidth<T>; ++e) some[e] = c.stored(from[e], state, uint32_t(offset + e));
  store(some, data, offset, count, whole);
}

// kWidth elements of one slot.
template <class Law, int N, typename S, typename T = Arithmetic<S>>
__device__ __forceinline__ void update_elements(
    const Recipe<S>& c, T scale, const Slot<S>& slot, S* const* slot_u, int64_t offset, int count, bool whole) {
  constexpr int W = kWidth<T>;
  const Raw x_raw = load<T>(slot.x, slot.x_type, offset, count, whole);
  const Raw g_raw = load<T>(slot.g, slot.g_type, offset, count, whole);
  T x[W], g[W], v[W] = {}, u[N ? N : 1][W], z[W], d[W];
  if (Law::kSecondMoment) widen(load<T>(slot.v, kDtype<S>, offset, count, whole), kDtype<S>, v);
  for (int j = 0; j < N; ++j) widen(load<T>(slot_u[j], kDtype<S>, offset, count, whole), kDtype<S>, u[j]);
  widen(x_raw, slot.x_type, x);
  widen(g_raw, slot.g_type, g);

  for (int e = 0; e < W; ++e) {
    g[e] = prepared(c, scale, g[e]);
    z[e] = Law::direction(c, g[e], v + e);
    d[e] = c.rest * z[e];
  }
  if (N > 0) {
    for (int j = 0; j < N; ++j) {
      for (int e = 0; e < W; ++e) follow(c, j, z[e], u[j][e], d[e]);
      store_state(c, u[j], slot_u[j], 1 + j, offset, count, whole);
    }
  } else {
    for (int j = 0; j < c.momenta; ++j) {
      widen(load<T>(slot_u[j], kDtype<S>, offset, count, whole), kDtype<S>, u[0]);
      for (int e = 0; e < W; ++e) follow(c, j, z[e], u[0][e], d[e]);
      store_state(c, u[0], slot_u[j], 1 + j, offset, count, whole);
    }
  }
  for (int e = 0; e < W; ++e) Law::apply(c, x[e], d[e], g[e], v + e);

  store(x, slot.x, slot.x_type, offset, count, whole);
  if (Law::kSecondMoment) store_state(c, v, slot.v, 0, offset, count, whole);
  if (slot.copy) store(x, slot.copy, slot.copy_type, offset, count, whole);
}

// N = 0 stands for any number of momenta.
template <class Law, int N, typename S>
__global__ void __launch_bounds__(kThreads) update(const __grid_constant__ Batch<N, S> batch) {
  using T = Arithmetic<S>;
  if (batch.found_inf && *batch.found_inf != 0.0f) return;
  const T scale = batch.grad_scale ? T(*batch.grad_scale) : T(1);
  const int momenta = N ? N : batch.recipe.momenta;
  for (int64_t chunk = blockIdx.x; chunk < batch.chunks; chunk += gridDim.x) {
    const int64_t index = slot_of(batch.slots, batch.slot_count, chunk);
    const Slot<S>& slot = batch.slots[index];
    S* const* const u = batch.u + index * momenta;
    const int64_t offset = ((chunk - slot.first_block) * kThreads + threadIdx.x) * kWidth<T>;
    const int64_t left = slot.numel - offset;
    if (left >= kWidth<T> && aligned(slot, u, momenta)) {
      update_elements<Law, N>(batch.recipe, scale, slot, u, offset, kWidth<T>, true);
    } else if (left > 0) {
      const int count = left < kWidth<T> ? int(left) : kWidth<T>;
      update_elements<Law, N>(batch.recipe, scale, slot, u, offset, count, false);
    }
  }
}

// As many launches as the arguments need, each with as many thread blocks as the device holds at once.
template <class Law, int N, typename S>
void launch(const Task<S>& task, int device, cudaStream_t stream) {
  const OnDevice guard(device);
  int processors = 0, resident = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, update<Law, N, S>, kThreads, 0));

  constexpr int64_t chunk = kThreads * kWidth<Arithmetic<S>>;
  const int momenta = task.hyper.momenta;
  Batch<N, S> batch{};
  batch.recipe = task.recipe;
  batch.grad_scale = task.grad_scale;
  batch.found_inf = task.found_inf;
  for (int64_t begin = 0; begin < task.slot_count; begin += batch.slot_count) {
    const int64_t left = task.slot_count - begin;
    batch.slot_count = int(left < Batch<N, S>::kSlots ? left : Batch<N, S>::kSlots);
    batch.chunks = 0;
    for (int i = 0; i < batch.slot_count; ++i) {
      batch.slots[i] = task.slots[begin + i];
      batch.slots[i].first_block = batch.chunks;
      batch.chunks += (batch.slots[i].numel + chunk - 1) / chunk;
      for (int j = 0; j < momenta; ++j) batch.u[i * momenta + j] = task.u[(begin + i) * momenta + j];
    }
    cudaLaunchConfig_t config{};
    const int64_t room = int64_t(processors) * resident;
    config.gridDim = dim3(unsigned(batch.chunks < room ? batch.chunks : room));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, update<Law, N, S>, batch));
  }
}

template <class Law, typename S>
void launch_by_count(const Task<S>& task, int device, cudaStream_t stream) {
  switch (task.hyper.momenta) {
    case 1: return launch<Law, 1>(task, device, stream);
    case 2: return launch<Law, 2>(task, device, stream);
    case 3: return launch<Law, 3>(task, device, stream);
    case 4: return launch<Law, 4>(task, device, stream);
    default: return launch<Law, 0>(task, device, stream);
  }
}

template <typename S>
void launch_by_rule(const Task<S>& task, int device, cudaStream_t stream) {
  switch (task.hyper.rule) {
    case Rule::kSgdm: return launch_by_count<Sgdm>(task, device, stream);
    case Rule::kAdam: return launch_by_count<Adam>(task, device, stream);
    case Rule::kAdopt: return launch_by_count<Adopt>(task, device, stream);
    case Rule::kAdoptStart: return launch<AdoptStart, 0>(task, device, stream);
  }
}

}  // namespace

void update_cuda(const Task<float>& task, int device, void* stream) {
  launch_by_rule(task, device, static_cast<cudaStream_t>(stream));
}

void update_cuda(const Task<BFloat16>& task, int device, void* stream) {
  launch_by_rule(task, device, static_cast<cudaStream_t>(stream));
}

void update_cuda(const Task<double>& task, int device, void* stream) {
  launch_by_rule(task, device, static_cast<cudaStream_t>(stream));
}

}  // namespace deslo
