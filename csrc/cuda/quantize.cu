// The CUDA kernels of few bits: a warp for each block, kAtOnce elements for each of its threads, one pass over memory.
//
// tests/emulation lets a C++ compiler build this file for machines without a GPU.
#include "../quantize.h"
#include "access.cuh"
#include "kernels.h"

namespace deslo {
namespace {

constexpr int kLanes = 32;
static_assert(kLanes * kAtOnce == kRecordBlock, "a warp takes a block");

// Tasks travel by value, with their slots. Blocks begin..end are those of these slots; QuantizeTask's `rows` too is
// that of the launch.
template <class Task>
struct RecordBatch {
  static constexpr int kSlots = (kArguments - 256) / int(sizeof(RecordSlot));

  Task task;
  int64_t begin, end;
  RecordSlot slots[kSlots];
};

// Where a thread stands: it has the elements from `element` on of every block that its warp takes.
struct Lane {
  int64_t warp, warps;
  int element;

  __device__ __forceinline__ Lane()
      : warp((int64_t(blockIdx.x) * kThreads + threadIdx.x) / kLanes),
        warps(int64_t(gridDim.x) * kThreads / kLanes),
        element(int(threadIdx.x) % kLanes * kAtOnce) {}
};

// The elements of a thread in a slot: `count` of them from `offset`, which may be none.
struct Piece {
  const RecordSlot& slot;
  int64_t offset;
  int count;

  __device__ __forceinline__ Piece(const RecordSlot* slots, int64_t slot_count, int64_t block, int element)
      : slot(slots[find_slot(slots, slot_count, block)]) {
    offset = (block - slot.first_block) * kRecordBlock + element;
    const int64_t left = slot.numel - offset;
    count = left < 0 ? 0 : left < kAtOnce ? int(left) : kAtOnce;
  }

  __device__ __forceinline__ Raw load_raw(const void* data, Dtype type) const {
    return load<float>(data, type, offset, count, count == kAtOnce && is_aligned(data, type));
  }

  __device__ __forceinline__ void store_floats(const float (&from)[kAtOnce], float* data) const {
    store(from, data, offset, count, count == kAtOnce && is_aligned(data, Dtype::kFloat32));
  }
};

// y of the elements of a piece; 0 behind the end of the tensor.
__device__ __forceinline__ void subtract(const Piece& piece, float (&y)[kAtOnce]) {
  const RecordSlot& slot = piece.slot;
  const Raw raw_value = piece.load_raw(slot.value, slot.value_type);
  Raw raw_base{}, raw_error{};
  if (slot.base) raw_base = piece.load_raw(slot.base, Dtype::kFloat32);
  if (slot.error) raw_error = piece.load_raw(slot.error, Dtype::kFloat32);
  float value[kAtOnce], base[kAtOnce], error[kAtOnce];
  widen(raw_value, slot.value_type, value);
  widen(raw_base, Dtype::kFloat32, base);
  widen(raw_error, Dtype::kFloat32, error);
  for (int e = 0; e < kAtOnce; ++e) y[e] = difference(value[e], base[e], slot.error ? error[e] : kNoError);
}

// The codes of kAtOnce elements: 2, 4 or 8 bytes.
template <class Format>
using Codes = typename std::conditional<Format::kBits == 16, uint2,
                                        typename std::conditional<Format::kBits == 8, uint32_t, uint16_t>::type>::type;

template <typename T>
__device__ __forceinline__ void store_bytes(const T& from, uint8_t* to) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T) == 0) {
    *reinterpret_cast<T*>(to) = from;
  } else {
    uint8_t bytes[sizeof(T)];
    memcpy(bytes, &from, sizeof(T));
    for (int k = 0; k < int(sizeof(T)); ++k) to[k] = bytes[k];
  }
}

template <typename T>
__device__ __forceinline__ T load_bytes(const uint8_t* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) == 0) return *reinterpret_cast<const T*>(from);
  uint8_t bytes[sizeof(T)];
  for (int k = 0; k < int(sizeof(T)); ++k) bytes[k] = from[k];
  T to;
  memcpy(&to, bytes, sizeof(T));
  return to;
}

template <class Format>
__device__ __forceinline__ uint8_t* find_codes(uint8_t* record, int element) {
  return record + Format::kScaleBytes + element * Format::kBits / 8;
}

// What a thread has read of a record, and has not decoded yet.
template <class Format>
struct Said {
  float scale = 0.0f;
  Codes<Format> codes;

  __device__ __forceinline__ Said(const uint8_t* record, int element)
      : codes(load_bytes<Codes<Format>>(find_codes<Format>(const_cast<uint8_t*>(record), element))) {
    if (Format::kScaleBytes) scale = load_bytes<float>(record);
  }

  __device__ __forceinline__ Said(float scale, const Codes<Format>& codes) : scale(scale), codes(codes) {}

  __device__ __forceinline__ void decode(float (&to)[kAtOnce]) const {
    uint32_t words[2] = {};
    memcpy(words, &codes, sizeof codes);
    for (int e = 0; e < kAtOnce; ++e) {
      const uint32_t word = words[e * Format::kBits / 32] >> (e * Format::kBits % 32);
      to[e] = read_code<Format>(word & ((1u << Format::kBits) - 1u), scale);
    }
  }
};

// Writes the record of the block that the warp holds, y of each thread, and returns what this thread wrote.
template <class Format>
__device__ __forceinline__ Said<Format> encode(const float (&y)[kAtOnce], uint8_t* record, int element) {
  Scale scale{};
  bool finite = true;
  if constexpr (Format::kScaleBytes > 0) {
    int32_t largest = 0;
    for (int e = 0; e < kAtOnce; ++e) {
      const int32_t size = magnitude<Format>(y[e]);
      largest = size > largest ? size : largest;
    }
    for (int lane = kLanes / 2; lane; lane /= 2) {
      const int32_t size = __shfl_xor_sync(0xffffffffu, largest, lane);
      largest = size > largest ? size : largest;
    }
    scale = make_scale<Format>(largest);
    finite = largest < kInfinity;
    if (element == 0) store_bytes(scale.scale, record);
  }
  uint32_t words[2] = {};
  for (int e = 0; e < kAtOnce; ++e) {
    const uint32_t code = make_code<Format>(finite ? y[e] : 0.0f, scale.inverse);
    words[e * Format::kBits / 32] |= code << (e * Format::kBits % 32);
  }
  Codes<Format> codes;
  memcpy(&codes, words, sizeof codes);
  store_bytes(codes, find_codes<Format>(record, element));
  return {scale.scale, codes};
}

// Whole threads of a warp: they exchange what they hold of a block.
template <class Format>
__global__ void __launch_bounds__(kThreads) quantize(const __grid_constant__ RecordBatch<QuantizeTask> batch) {
  const Lane lane;
  const QuantizeTask& task = batch.task;
  for (int64_t block = batch.begin + lane.warp; block < batch.end; block += lane.warps) {
    float y[kAtOnce] = {};
    if (block < task.blocks) subtract({batch.slots, task.count, block, lane.element}, y);
    const int64_t row = block - task.first;
    if (row >= 0 && row < task.own_rows) {
      store(y, task.own, row * kRecordBlock + lane.element, kAtOnce, is_aligned(task.own, Dtype::kFloat32));
    }
    uint8_t* const record = task.records + block * Format::kRecordBytes;
    if (block < task.blocks) {
      encode<Format>(y, record, lane.element);
    } else {
      if (Format::kScaleBytes && lane.element == 0) store_bytes(0.0f, record);
      store_bytes(Codes<Format>{}, find_codes<Format>(record, lane.element));
    }
  }
}

template <class Format>
__global__ void __launch_bounds__(kThreads) take_mean(const __grid_constant__ MeanTask task) {
  const Lane lane;
  for (int64_t block = lane.warp; block < task.blocks; block += lane.warps) {
    const int64_t offset = block * kRecordBlock + lane.element;
    const bool whole = is_aligned(task.own, Dtype::kFloat32);
    const Raw raw_own = load<float>(task.own, Dtype::kFloat32, offset, kAtOnce, whole);
    float own[kAtOnce], said[kAtOnce], mean[kAtOnce] = {};
    widen(raw_own, Dtype::kFloat32, own);
#pragma unroll 4
    for (int64_t j = 0; j < task.replicas; ++j) {
      const float weight = task.weights[j];
      if (j == task.rank) {
        for (int e = 0; e < kAtOnce; ++e) mean[e] += weight * own[e];
      } else {
        const uint8_t* const record = task.received + (j * task.blocks + block) * Format::kRecordBytes;
        Said<Format>(record, lane.element).decode(said);
        for (int e = 0; e < kAtOnce; ++e) mean[e] += weight * said[e];
      }
    }
    encode<Format>(mean, task.records + block * Format::kRecordBytes, lane.element).decode(said);
    const float weight = task.weights[task.rank];
    for (int e = 0; e < kAtOnce; ++e) own[e] = residual(mean[e], said[e], weight);
    store(own, task.own, offset, kAtOnce, whole);
  }
}

template <class Format>
__global__ void __launch_bounds__(kThreads) dequantize(const __grid_constant__ RecordBatch<DequantizeTask> batch) {
  const Lane lane;
  for (int64_t block = batch.begin + lane.warp; block < batch.end; block += lane.warps) {
    const Piece piece(batch.slots, batch.task.count, block, lane.element);
    const Said<Format> read(batch.task.records + block * Format::kRecordBytes, lane.element);
    Raw raw_base{};
    if (piece.slot.base) raw_base = piece.load_raw(piece.slot.base, Dtype::kFloat32);
    float base[kAtOnce], mean[kAtOnce];
    widen(raw_base, Dtype::kFloat32, base);
    read.decode(mean);
    for (int e = 0; e < kAtOnce; ++e) mean[e] = piece.slot.base ? mean[e] + base[e] : mean[e];
    piece.store_floats(mean, piece.slot.mean);
  }
}

template <class Format>
__global__ void __launch_bounds__(kThreads) carry(const __grid_constant__ RecordBatch<CarryTask> batch) {
  const Lane lane;
  for (int64_t block = batch.begin + lane.warp; block < batch.end; block += lane.warps) {
    const Piece piece(batch.slots, batch.task.count, block, lane.element);
    const RecordSlot& slot = piece.slot;
    const float* const own = slot.error ? batch.task.find_own(block) : nullptr;
    Raw raw_mean{};
    if (slot.mean) raw_mean = piece.load_raw(slot.mean, Dtype::kFloat32);
    float lost[kAtOnce], mean[kAtOnce];
    if (own) {
      const bool whole = is_aligned(own, Dtype::kFloat32);
      widen(load<float>(own, Dtype::kFloat32, lane.element, kAtOnce, whole), Dtype::kFloat32, lost);
    } else if (slot.error) {
      const Said<Format> read(batch.task.sent + block * Format::kRecordBytes, lane.element);
      float said[kAtOnce];
      subtract(piece, lost);
      read.decode(said);
      for (int e = 0; e < kAtOnce; ++e) lost[e] -= said[e];
    }
    if (slot.error) piece.store_floats(lost, slot.error);
    widen(raw_mean, Dtype::kFloat32, mean);
    if (slot.base && slot.mean) piece.store_floats(mean, slot.base);
  }
}

template <typename Kernel>
int64_t grid_size(Kernel kernel, int64_t blocks, int device) {
  const int64_t needed = (blocks * kLanes + kThreads - 1) / kThreads, resident = count_resident_blocks(kernel, device);
  return needed < resident ? needed : resident;
}

// Queues `kernel` for as many slots at once as a launch holds. Blocks up to `rows` go with the last ones.
template <class Task>
void queue_batches(void (*kernel)(RecordBatch<Task>), const Task& task, int64_t rows, int device, void* stream) {
  RecordBatch<Task> batch{};
  batch.task = task;
  int64_t next = 0;
  do {
    const int64_t left = task.count - next;
    batch.task.count = left < batch.kSlots ? left : batch.kSlots;
    for (int64_t i = 0; i < batch.task.count; ++i) batch.slots[i] = task.slots[next + i];
    next += batch.task.count;
    batch.begin = batch.end;
    batch.end = next < task.count ? task.slots[next].first_block : rows;
    queue_kernel(kernel, grid_size(kernel, batch.end - batch.begin, device), kThreads,
                 static_cast<cudaStream_t>(stream), batch);
  } while (next < task.count);
}

}  // namespace

void records_cuda(const QuantizeTask& task, int device, void* stream) {
  with_format(task.format,
              [&](auto format) { queue_batches(quantize<decltype(format)>, task, task.rows, device, stream); });
}

void records_cuda(const MeanTask& task, int device, void* stream) {
  with_format(task.format, [&](auto format) {
    const auto kernel = take_mean<decltype(format)>;
    queue_kernel(kernel, grid_size(kernel, task.blocks, device), kThreads, static_cast<cudaStream_t>(stream), task);
  });
}

void records_cuda(const DequantizeTask& task, int device, void* stream) {
  with_format(task.format,
              [&](auto format) { queue_batches(dequantize<decltype(format)>, task, task.blocks, device, stream); });
}

void records_cuda(const CarryTask& task, int device, void* stream) {
  with_format(task.format,
              [&](auto format) { queue_batches(carry<decltype(format)>, task, task.blocks, device, stream); });
}

}  // namespace deslo
