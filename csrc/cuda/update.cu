// The CUDA kernel of the rules: many tensors in one launch, 16-byte accesses, every load of an element in flight before
// its arithmetic.
//
// tests/emulation lets a C++ compiler build this file for machines without a GPU.
#include "access.cuh"
#include "kernels.h"

namespace deslo {
namespace {

// What one launch does. It travels by value, so there is no copy to the device to wait for and a CUDA graph can hold
// it. Source is Coefficients<S>, or const Coefficients<S>* where a kernel computes them on the device. first_block of a
// slot counts chunks here: kThreads accesses of kWidth elements.
template <int N, typename S, typename Source>
struct UpdateBatch {
  static constexpr int kMomenta = N ? N : kMaxMomenta;
  static constexpr int kSlots =
      (kArguments - int(sizeof(Coefficients<S>))) / int(sizeof(ParamSlot<S>) + kMomenta * sizeof(S*));

  Source coefficients;
  const float* grad_scale;
  const float* found_inf;
  int64_t chunks;
  int slot_count;
  ParamSlot<S> slots[kSlots];
  S* u[kSlots * kMomenta];
};

template <typename S>
__device__ __forceinline__ const Coefficients<S>& dereference(const Coefficients<S>& coefficients) {
  return coefficients;
}

template <typename S>
__device__ __forceinline__ const Coefficients<S>& dereference(const Coefficients<S>* coefficients) {
  return *coefficients;
}

// Whether every tensor of a slot begins where whole accesses may.
template <typename S>
__device__ __forceinline__ bool is_aligned(const ParamSlot<S>& slot, S* const* u, int momenta) {
  bool all = is_aligned(slot.x, slot.x_type) && is_aligned(slot.g, slot.g_type) && is_aligned(slot.v, kDtype<S>) &&
             is_aligned(slot.copy, slot.copy_type);
  for (int j = 0; j < momenta; ++j) all = all && is_aligned(u[j], kDtype<S>);
  return all;
}

// Rounds and stores new values of a state: 0 is v, 1 + j is u[j].
template <typename S, typename T>
__device__ __forceinline__ void store_state(const Coefficients<S>& c, const T* from, S* data, int state, int64_t offset,
                                            int count, bool whole) {
  S values[kWidth<T>];
  for (int e = 0; e < kWidth<T>; ++e) values[e] = c.round_state(from[e], state, uint32_t(offset + e));
  store(values, data, offset, count, whole);
}

// Updates kWidth elements of one slot.
template <class UpdateRule, int N, typename S, typename T = Arithmetic<S>>
__device__ __forceinline__ void update_elements(const Coefficients<S>& c, T scale, const ParamSlot<S>& slot,
                                                S* const* slot_u, int64_t offset, int count, bool whole) {
  constexpr int W = kWidth<T>;
  const Raw x_raw = load<T>(slot.x, slot.x_type, offset, count, whole);
  const Raw g_raw = load<T>(slot.g, slot.g_type, offset, count, whole);
  T x[W], g[W], v[W] = {}, u[N ? N : 1][W], z[W], d[W];
  if (UpdateRule::kSecondMoment) widen(load<T>(slot.v, kDtype<S>, offset, count, whole), kDtype<S>, v);
  for (int j = 0; j < N; ++j) widen(load<T>(slot_u[j], kDtype<S>, offset, count, whole), kDtype<S>, u[j]);
  widen(x_raw, slot.x_type, x);
  widen(g_raw, slot.g_type, g);

  for (int e = 0; e < W; ++e) {
    g[e] = prepare_gradient(c, scale, g[e]);
    z[e] = UpdateRule::normalize_gradient(c, g[e], v + e);
    d[e] = c.rest * z[e];
  }
  if (N > 0) {
    for (int j = 0; j < N; ++j) {
      for (int e = 0; e < W; ++e) update_momentum(c, j, z[e], u[j][e], d[e]);
      store_state(c, u[j], slot_u[j], 1 + j, offset, count, whole);
    }
  } else {
    for (int j = 0; j < c.momenta; ++j) {
      widen(load<T>(slot_u[j], kDtype<S>, offset, count, whole), kDtype<S>, u[0]);
      for (int e = 0; e < W; ++e) update_momentum(c, j, z[e], u[0][e], d[e]);
      store_state(c, u[0], slot_u[j], 1 + j, offset, count, whole);
    }
  }
  for (int e = 0; e < W; ++e) UpdateRule::apply(c, x[e], d[e], g[e], v + e);

  store(x, slot.x, slot.x_type, offset, count, whole);
  if (UpdateRule::kSecondMoment) store_state(c, v, slot.v, 0, offset, count, whole);
  if (slot.copy) store(x, slot.copy, slot.copy_type, offset, count, whole);
}

// N = 0 stands for any number of momenta.
template <class UpdateRule, int N, typename S, typename Source>
__global__ void __launch_bounds__(kThreads) update(const __grid_constant__ UpdateBatch<N, S, Source> batch) {
  using T = Arithmetic<S>;
  const Coefficients<S>& coefficients = dereference<S>(batch.coefficients);
  if (batch.found_inf && *batch.found_inf != 0.0f) return;
  const T scale = batch.grad_scale ? T(*batch.grad_scale) : T(1);
  const int momenta = N ? N : coefficients.momenta;
  for (int64_t chunk = blockIdx.x; chunk < batch.chunks; chunk += gridDim.x) {
    const int64_t index = find_slot(batch.slots, batch.slot_count, chunk);
    const ParamSlot<S>& slot = batch.slots[index];
    S* const* const u = batch.u + index * momenta;
    const int64_t offset = ((chunk - slot.first_block) * kThreads + threadIdx.x) * kWidth<T>;
    const int64_t left = slot.numel - offset;
    if (left >= kWidth<T> && is_aligned(slot, u, momenta)) {
      update_elements<UpdateRule, N>(coefficients, scale, slot, u, offset, kWidth<T>, true);
    } else if (left > 0) {
      const int count = left < kWidth<T> ? int(left) : kWidth<T>;
      update_elements<UpdateRule, N>(coefficients, scale, slot, u, offset, count, false);
    }
  }
}

// One thread computes the coefficients from *t and *lr, as they are when the stream reaches this kernel. The first step
// of ADOPT is a rule of its own: both kernels are queued, and one of them skips.
template <typename S>
__global__ void prepare(const __grid_constant__ UpdateTask<S> task, PreparedUpdate<S>* prepared) {
  Hyperparameters hyper = task.hyper;
  if (task.t) hyper.t = *task.t;
  if (task.lr) hyper.lr = *task.lr;
  const bool other = task.t && hyper.rule == (hyper.t == 0 ? Rule::kAdopt : Rule::kAdoptStart);
  prepared->coefficients = make_coefficients<S>(hyper);
  prepared->skip = other || (task.found_inf && *task.found_inf != 0.0f);
}

// As many launches as the arguments need, each with as many thread blocks as the device holds at once.
template <class UpdateRule, int N, typename S, typename Source>
void launch(const UpdateTask<S>& task, Source coefficients, int device, cudaStream_t stream) {
  using Batch = UpdateBatch<N, S, Source>;
  constexpr int64_t chunk = kThreads * kWidth<Arithmetic<S>>;
  const int64_t resident = count_resident_blocks(update<UpdateRule, N, S, Source>, device);
  const int momenta = task.hyper.momenta;
  Batch batch{};
  batch.coefficients = coefficients;
  batch.grad_scale = task.grad_scale;
  batch.found_inf = task.found_inf;
  for (int64_t begin = 0; begin < task.slot_count; begin += batch.slot_count) {
    const int64_t left = task.slot_count - begin;
    batch.slot_count = int(left < Batch::kSlots ? left : Batch::kSlots);
    batch.chunks = 0;
    for (int i = 0; i < batch.slot_count; ++i) {
      batch.slots[i] = task.slots[begin + i];
      batch.slots[i].first_block = batch.chunks;
      batch.chunks += (batch.slots[i].numel + chunk - 1) / chunk;
      for (int j = 0; j < momenta; ++j) batch.u[i * momenta + j] = task.u[(begin + i) * momenta + j];
    }
    queue_kernel(update<UpdateRule, N, S, Source>, batch.chunks < resident ? batch.chunks : resident, kThreads, stream,
                 batch);
  }
}

template <class UpdateRule, typename S, typename Source>
void launch_by_count(const UpdateTask<S>& task, Source coefficients, int device, cudaStream_t stream) {
  switch (task.hyper.momenta) {
    case 1: return launch<UpdateRule, 1>(task, coefficients, device, stream);
    case 2: return launch<UpdateRule, 2>(task, coefficients, device, stream);
    case 3: return launch<UpdateRule, 3>(task, coefficients, device, stream);
    case 4: return launch<UpdateRule, 4>(task, coefficients, device, stream);
    default: return launch<UpdateRule, 0>(task, coefficients, device, stream);
  }
}

template <typename S, typename Source>
void launch_by_rule(const UpdateTask<S>& task, Source coefficients, int device, cudaStream_t stream) {
  switch (task.hyper.rule) {
    case Rule::kSgdm: return launch_by_count<Sgdm>(task, coefficients, device, stream);
    case Rule::kAdam: return launch_by_count<Adam>(task, coefficients, device, stream);
    case Rule::kAdopt: return launch_by_count<Adopt>(task, coefficients, device, stream);
    case Rule::kAdoptStart: return launch<AdoptStart, 0>(task, coefficients, device, stream);
  }
}

template <typename S>
void launch_prepared(UpdateTask<S> task, int device, cudaStream_t stream, PreparedUpdate<S>* prepared) {
  queue_kernel(prepare<S>, 1, 1, stream, task, prepared);
  task.found_inf = &prepared->skip;
  launch_by_rule(task, static_cast<const Coefficients<S>*>(&prepared->coefficients), device, stream);
}

template <typename S>
void launch_task(const UpdateTask<S>& task, int device, void* stream_handle, PreparedUpdate<S>* prepared) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  if (!task.t && !task.lr) return launch_by_rule(task, task.coefficients, device, stream);
  if (task.t && task.hyper.rule == Rule::kAdopt) {
    UpdateTask<S> start = task;
    start.hyper.rule = Rule::kAdoptStart;
    start.hyper.momenta = 0;
    launch_prepared(start, device, stream, prepared);
  }
  launch_prepared(task, device, stream, prepared);
}

}  // namespace

void update_cuda(const UpdateTask<float>& task, int device, void* stream, PreparedUpdate<float>* prepared) {
  launch_task(task, device, stream, prepared);
}

void update_cuda(const UpdateTask<double>& task, int device, void* stream, PreparedUpdate<double>* prepared) {
  launch_task(task, device, stream, prepared);
}

void update_cuda(const UpdateTask<BFloat16>& task, int device, void* stream, PreparedUpdate<BFloat16>* prepared) {
  launch_task(task, device, stream, prepared);
}

}  // namespace deslo
