// Just enough of CUDA for a C++ compiler to build csrc/cuda/*.cu and run their threads one after the other on the CPU;
// those of a warp that exchange values take turns.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) ushort4 {
  uint16_t x, y, z, w;
};

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline ushort4 make_ushort4(uint16_t x, uint16_t y, uint16_t z, uint16_t w) { return {x, y, z, w}; }

template <typename V>
void __stcs(V* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 3, cudaSuccess; }

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, int) {
  return *blocks = 2, cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

// The threads of one warp. Each has a stack of its own, from which it returns to run() at every exchange; but for the
// first they need none in a kernel without exchanges.
class Warp {
 public:
  static constexpr int kThreads = 32;

  static Warp& instance() {
    thread_local Warp warp;
    return warp;
  }

  // The threads first..first + count of a block, all through `kernel`.
  void run(unsigned first, int count, const std::function<void()>& kernel) {
    first_ = first, kernel_ = &kernel, round_ = 0;
    for (int thread = 0; thread < count; ++thread) done_[thread] = false;
    start(0);
    if (done_[0]) {
      for (int thread = 1; thread < count; ++thread) {
        threadIdx.x = first + thread, current_ = -1;
        kernel();
      }
      return;
    }
    for (int thread = 1; thread < count; ++thread) start(thread);
    while (!done_[0]) {
      ++round_;
      for (int thread = 0; thread < count; ++thread) {
        if (done_[thread]) std::abort();  // a thread has ended that another one exchanges with
        resume(thread);
      }
    }
    for (int thread = 0; thread < count; ++thread) {
      if (!done_[thread]) std::abort();
    }
  }

  uint32_t exchange(uint32_t value, int distance) {
    if (current_ < 0) std::abort();                 // the first thread of the warp has ended without an exchange
    const int self = current_, round = round_ % 2;  // others may be a round ahead while this one reads
    values_[round][self] = value;
    swapcontext(&threads_[self], &main_);
    return values_[round][self ^ distance];
  }

 private:
  static constexpr size_t kStack = 1 << 18;

  void start(int thread) {
    if (!stacks_[thread]) stacks_[thread].reset(new char[kStack]);
    getcontext(&threads_[thread]);
    threads_[thread].uc_stack.ss_sp = stacks_[thread].get();
    threads_[thread].uc_stack.ss_size = kStack;
    threads_[thread].uc_link = &main_;
    makecontext(&threads_[thread], &Warp::enter, 0);
    resume(thread);
  }

  void resume(int thread) {
    threadIdx.x = first_ + thread, current_ = thread;
    swapcontext(&main_, &threads_[thread]);
  }

  static void enter() {
    Warp& warp = instance();
    (*warp.kernel_)();
    warp.done_[warp.current_] = true;
  }

  ucontext_t main_, threads_[kThreads];
  std::unique_ptr<char[]> stacks_[kThreads];
  bool done_[kThreads];
  uint32_t values_[2][kThreads];
  const std::function<void()>* kernel_;
  unsigned first_;
  int current_, round_;
};

inline int32_t __shfl_xor_sync(unsigned, int32_t value, int distance) {
  return int32_t(Warp::instance().exchange(uint32_t(value), distance));
}

// Six thread blocks at most, as the two numbers above say: a large tensor takes several rounds of the grid.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    for (unsigned first = 0; first < blockDim.x; first += Warp::kThreads) {
      const unsigned left = blockDim.x - first;
      Warp::instance().run(first, left < Warp::kThreads ? int(left) : Warp::kThreads, [&] { kernel(arguments...); });
    }
  }
  return cudaSuccess;
}
