// Shared by the CUDA kernels: loads and stores in whole accesses of 16 or 8 bytes, and launches.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../update.h"

namespace deslo {
namespace {

constexpr int kThreads = 256;
constexpr int kArguments = 32000;  // bytes of kernel arguments; CUDA allows 32,764

template <typename T>
constexpr int kWidth = 16 / sizeof(T);

// 16 bytes of memory, or 8 of a 16-bit format, not yet converted: conversions wait until all loads are in flight.
struct Raw {
  uint32_t words[4];
};

// One access of 16 or 8 bytes. Plain stores of vectors are taken apart by the compiler behind a square root or a
// quotient. __stcs: nothing is read again before the next step.
__device__ __forceinline__ void store_vector(const float* from, float* to) {
  __stcs(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
}

__device__ __forceinline__ void store_vector(const double* from, double* to) {
  __stcs(reinterpret_cast<double2*>(to), make_double2(from[0], from[1]));
}

__device__ __forceinline__ void store_vector(const BFloat16* from, BFloat16* to) {
  __stcs(reinterpret_cast<ushort4*>(to), make_ushort4(from[0].bits, from[1].bits, from[2].bits, from[3].bits));
}

template <typename V>
__device__ __forceinline__ void load_vector(const void* from, void* to) {
  const V vector = *static_cast<const V*>(from);
  memcpy(to, &vector, sizeof vector);
}

__device__ __forceinline__ bool is_half(Dtype type) { return type == Dtype::kBFloat16 || type == Dtype::kFloat16; }

// Elements offset .. offset + count. `whole` says that there are kWidth of them, aligned.
template <typename T>
__device__ __forceinline__ Raw load(const void* data, Dtype type, int64_t offset, int count, bool whole) {
  Raw raw{};
  if (is_half(type)) {
    const uint16_t* const from = static_cast<const uint16_t*>(data) + offset;
    if (whole) {
      load_vector<uint2>(from, &raw);
    } else {
      for (int e = 0; e < kWidth<T>; ++e) {
        if (e < count) raw.words[e / 2] |= uint32_t(from[e]) << (16 * (e % 2));
      }
    }
  } else {
    const T* const from = static_cast<const T*>(data) + offset;
    if (whole) {
      load_vector<uint4>(from, &raw);
    } else {
      T values[kWidth<T>] = {};
      for (int e = 0; e < kWidth<T>; ++e) {
        if (e < count) values[e] = from[e];
      }
      memcpy(&raw, values, sizeof raw);
    }
  }
  return raw;
}

template <typename T>
__device__ __forceinline__ void widen(const Raw& raw, Dtype type, T* to) {
  if (!is_half(type)) {
    memcpy(to, &raw, sizeof raw);
    return;
  }
  for (int e = 0; e < kWidth<T>; ++e) {
    const uint16_t bits = uint16_t(raw.words[e / 2] >> (16 * (e % 2)));
    to[e] = T(type == Dtype::kBFloat16 ? BFloat16{bits}.to_float() : Float16{bits}.to_float());
  }
}

// Stores kWidth elements that have the format of the memory already.
template <typename S, int W>
__device__ __forceinline__ void store(const S (&from)[W], S* data, int64_t offset, int count, bool whole) {
  if (whole) {
    store_vector(from, data + offset);
  } else {
    for (int e = 0; e < W; ++e) {
      if (e < count) data[offset + e] = from[e];
    }
  }
}

template <typename T, int W>
__device__ __forceinline__ void store(const T (&from)[W], void* data, Dtype type, int64_t offset, int count,
                                      bool whole) {
  if (is_half(type)) {
    BFloat16 values[4] = {};  // Float16 too is 16 bits
    for (int e = 0; e < W; ++e) {
      const float a = float(from[e]);
      values[e].bits = type == Dtype::kBFloat16 ? BFloat16::from_float(a).bits : Float16::from_float(a).bits;
    }
    store(values, static_cast<BFloat16*>(data), offset, count, whole);
  } else {
    store(from, static_cast<T*>(data), offset, count, whole);
  }
}

// kAtOnce elements that are not yet converted; float64 takes both halves.
constexpr int kAtOnce = 4;

struct Elements {
  Raw raw[2];
};

// Those of the elements offset .. offset + kAtOnce that are among the first `count`; the others are 0.
__device__ __forceinline__ Elements load_elements(const void* data, Dtype type, int64_t offset, int count, bool whole) {
  Elements elements{};
  if (type == Dtype::kFloat64) {
    elements.raw[0] = load<double>(data, type, offset, count, whole);
    elements.raw[1] = load<double>(data, type, offset + 2, count - 2, whole);
  } else {
    elements.raw[0] = load<float>(data, type, offset, count, whole);
  }
  return elements;
}

template <typename T>
__device__ __forceinline__ void widen(const Elements& elements, Dtype type, T (&to)[kAtOnce]) {
  if (type == Dtype::kFloat64) {
    double values[kAtOnce];
    memcpy(values, &elements, sizeof values);
    for (int e = 0; e < kAtOnce; ++e) to[e] = T(values[e]);
    return;
  }
  float values[kAtOnce];
  widen(elements.raw[0], type, values);
  for (int e = 0; e < kAtOnce; ++e) to[e] = T(values[e]);
}

// Whether whole accesses may begin at `data`.
__device__ __forceinline__ bool is_aligned(const void* data, Dtype type) {
  return reinterpret_cast<uintptr_t>(data) % (is_half(type) ? 8 : 16) == 0;
}

void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("deslo: CUDA: ") + cudaGetErrorString(error));
}

// How many thread blocks of `kernel` the device runs at once. `device` must be current.
template <typename Kernel>
int64_t count_resident_blocks(Kernel kernel, int device) {
  int processors = 0, resident = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0));
  return int64_t(processors) * resident;
}

template <typename... Parameters, typename... Arguments>
void queue_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                  const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace
}  // namespace deslo
