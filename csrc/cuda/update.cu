// The CUDA kernel of the rules: many tensors in one launch, 16-byte accesses, every load of an element in flight before
// its arithmetic.
//
// tests/emulation lets a C++ compiler build this file for machines without a GPU.
#include "access.cuh"
#include "kernels.h"

namespace deslo {
namespace {

// What one launch does. It travels by value, so there is no copy to the device to wait for and a CUDA graph can hold it.
// Source is Recipe<S>, or const Recipe<S>* for one that is made on the device. first_block of a slot counts chunks here:
// kThreads accesses of kWidth elements.
template <int N, typename S, typename Source>
struct Batch {
  static constexpr int kMomenta = N ? N : kMaxMomenta;
  static constexpr int kSlots = (kArguments - int(sizeof(Recipe<S>))) / int(sizeof(Slot<S>) + kMomenta * sizeof(S*));

  Source recipe;
  const float* grad_scale;
  const float* found_inf;
  int64_t chunks;
  int slot_count;
  Slot<S> slots[kSlots];
  S* u[kSlots * kMomenta];
};

template <typename S>
__device__ __forceinline__ const Recipe<S>& fetched(const Recipe<S>& recipe) {
  return recipe;
}

template <typename S>
__device__ __forceinline__ const Recipe<S>& fetched(const Recipe<S>* recipe) {
  return *recipe;
}

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
template <class Law, int N, typename S, typename Source>
__global__ void __launch_bounds__(kThreads) update(const __grid_constant__ Batch<N, S, Source> batch) {
  using T = Arithmetic<S>;
  const Recipe<S>& recipe = fetched<S>(batch.recipe);
  if (batch.found_inf && *batch.found_inf != 0.0f) return;
  const T scale = batch.grad_scale ? T(*batch.grad_scale) : T(1);
  const int momenta = N ? N : recipe.momenta;
  for (int64_t chunk = blockIdx.x; chunk < batch.chunks; chunk += gridDim.x) {
    const int64_t index = slot_of(batch.slots, batch.slot_count, chunk);
    const Slot<S>& slot = batch.slots[index];
    S* const* const u = batch.u + index * momenta;
    const int64_t offset = ((chunk - slot.first_block) * kThreads + threadIdx.x) * kWidth<T>;
    const int64_t left = slot.numel - offset;
    if (left >= kWidth<T> && aligned(slot, u, momenta)) {
      update_elements<Law, N>(recipe, scale, slot, u, offset, kWidth<T>, true);
    } else if (left > 0) {
      const int count = left < kWidth<T> ? int(left) : kWidth<T>;
      update_elements<Law, N>(recipe, scale, slot, u, offset, count, false);
    }
  }
}

// One thread: the recipe of the *t and *lr that the stream has come to. The first step of ADOPT is a rule of its own, and of
// the two kernels that are queued one skips.
template <typename S>
__global__ void prepare(const __grid_constant__ Task<S> task, Prepared<S>* prepared) {
  Hyper hyper = task.hyper;
  if (task.t) hyper.t = *task.t;
  if (task.lr) hyper.lr = *task.lr;
  const bool other = task.t && hyper.rule == (hyper.t == 0 ? Rule::kAdopt : Rule::kAdoptStart);
  prepared->recipe = recipe<S>(hyper);
  prepared->skip = other || (task.found_inf && *task.found_inf != 0.0f);
}

// As many launches as the arguments need, each with as many thread blocks as the device holds at once.
template <class Law, int N, typename S, typename Source>
void launch(const Task<S>& task, Source recipe, int device, cudaStream_t stream) {
  using One = Batch<N, S, Source>;
  constexpr int64_t chunk = kThreads * kWidth<Arithmetic<S>>;
  const int64_t room = resident_blocks(update<Law, N, S, Source>, device);
  const int momenta = task.hyper.momenta;
  One batch{};
  batch.recipe = recipe;
  batch.grad_scale = task.grad_scale;
  batch.found_inf = task.found_inf;
  for (int64_t begin = 0; begin < task.slot_count; begin += batch.slot_count) {
    const int64_t left = task.slot_count - begin;
    batch.slot_count = int(left < One::kSlots ? left : One::kSlots);
    batch.chunks = 0;
    for (int i = 0; i < batch.slot_count; ++i) {
      batch.slots[i] = task.slots[begin + i];
      batch.slots[i].first_block = batch.chunks;
      batch.chunks += (batch.slots[i].numel + chunk - 1) / chunk;
      for (int j = 0; j < momenta; ++j) batch.u[i * momenta + j] = task.u[(begin + i) * momenta + j];
    }
    queue(update<Law, N, S, Source>, batch.chunks < room ? batch.chunks : room, kThreads, stream, batch);
  }
}

template <class Law, typename S, typename Source>
void launch_by_count(const Task<S>& task, Source recipe, int device, cudaStream_t stream) {
  switch (task.hyper.momenta) {
    case 1: return launch<Law, 1>(task, recipe, device, stream);
    case 2: return launch<Law, 2>(task, recipe, device, stream);
    case 3: return launch<Law, 3>(task, recipe, device, stream);
    case 4: return launch<Law, 4>(task, recipe, device, stream);
    default: return launch<Law, 0>(task, recipe, device, stream);
  }
}

template <typename S, typename Source>
void launch_by_rule(const Task<S>& task, Source recipe, int device, cudaStream_t stream) {
  switch (task.hyper.rule) {
    case Rule::kSgdm: return launch_by_count<Sgdm>(task, recipe, device, stream);
    case Rule::kAdam: return launch_by_count<Adam>(task, recipe, device, stream);
    case Rule::kAdopt: return launch_by_count<Adopt>(task, recipe, device, stream);
    case Rule::kAdoptStart: return launch<AdoptStart, 0>(task, recipe, device, stream);
  }
}

template <typename S>
void launch_prepared(Task<S> task, int device, cudaStream_t stream, Prepared<S>* prepared) {
  queue(prepare<S>, 1, 1, stream, task, prepared);
  task.found_inf = &prepared->skip;
  launch_by_rule(task, static_cast<const Recipe<S>*>(&prepared->recipe), device, stream);
}

template <typename S>
void launch_task(const Task<S>& task, int device, void* on, Prepared<S>* prepared) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  if (!task.t && !task.lr) return launch_by_rule(task, task.recipe, device, stream);
  if (task.t && task.hyper.rule == Rule::kAdopt) {
    Task<S> start = task;
    start.hyper.rule = Rule::kAdoptStart;
    start.hyper.momenta = 0;
    launch_prepared(start, device, stream, prepared);
  }
  launch_prepared(task, device, stream, prepared);
}

}  // namespace

void update_cuda(const Task<float>& task, int device, void* stream, Prepared<float>* prepared) {
  launch_task(task, device, stream, prepared);
}

void update_cuda(const Task<double>& task, int device, void* stream, Prepared<double>* prepared) {
  launch_task(task, device, stream, prepared);
}

void update_cuda(const Task<BFloat16>& task, int device, void* stream, Prepared<BFloat16>* prepared) {
  launch_task(task, device, stream, prepared);
}

}  // namespace deslo
