// The CUDA kernels as the host sees them, on plain pointers: the .cu files know nothing of torch.
#pragma once

#include "../delayed_update.h"
#include "../drift.h"
#include "../fingerprint.h"

namespace deslo {

// What a kernel makes on the device where t or lr lie there.
template <typename S>
struct Prepared {
  Recipe<S> recipe;
  float skip;  // not 0: nothing is written
};

// Every function here wants `device` to be current.

// Queues the task on `stream` (a cudaStream_t) of `device`. `prepared` is memory of the device, to be kept until the stream has
// come by; it is not looked at if task.t and task.lr are null. Throws std::runtime_error if the launch fails.
void update_cuda(const Task<float>& task, int device, void* stream, Prepared<float>* prepared);
void update_cuda(const Task<double>& task, int device, void* stream, Prepared<double>* prepared);
void update_cuda(const Task<BFloat16>& task, int device, void* stream, Prepared<BFloat16>* prepared);

// Likewise: adds to `sums`, kSums rows of drift_columns(device) numbers each. The columns add up to the result.
int64_t drift_columns(int device);
void drift_cuda(const DriftTask& task, int device, void* stream, double* sums);

void land_cuda(const LandTask& task, int device, void* stream);

// Likewise: adds to `sums`, fingerprint_columns(task, device) numbers that add up to the result.
int64_t fingerprint_columns(const FingerprintTask& task, int device);
void fingerprint_cuda(const FingerprintTask& task, int device, void* stream, uint64_t* sums);

// What a kernel of this module would meet on `device`. Nothing runs.
struct CudaStatus {
  const char* error;    // the name of the CUDA error, "" if there is none
  int driver, runtime;  // CUDA versions as 1000 major + 10 minor; driver is 0 where there is none
};

CudaStatus status_cuda(int device);

}  // namespace deslo
