// The CUDA kernels as host functions on plain pointers. The .cu files include nothing of torch.
#pragma once

#include "../delayed_update.h"
#include "../drift.h"
#include "../fingerprint.h"
#include "../quantize.h"

namespace deslo {

// Computed by a kernel on the device, where t or lr are tensors there.
template <typename S>
struct PreparedUpdate {
  Coefficients<S> coefficients;
  float skip;  // not 0: nothing is written
};

// Every function here needs `device` to be current.

// Queues the task on `stream` (a cudaStream_t) of `device`. `prepared` is memory of the device that
// must live until the stream has run the task; it is not read if task.t and task.lr are null. Throws std::runtime_error
// if the launch fails.
void update_cuda(const UpdateTask<float>& task, int device, void* stream, PreparedUpdate<float>* prepared);
void update_cuda(const UpdateTask<double>& task, int device, void* stream, PreparedUpdate<double>* prepared);
void update_cuda(const UpdateTask<BFloat16>& task, int device, void* stream, PreparedUpdate<BFloat16>* prepared);

// Likewise: adds to `sums`, kSums rows of drift_columns(device) numbers each. The columns add up to the result.
int64_t drift_columns(int device);
void drift_cuda(const DriftTask& task, int device, void* stream, double* sums);

void land_cuda(const LandTask& task, int device, void* stream);

// Likewise: adds to `sums`, fingerprint_columns(task, device) numbers that add up to the result.
int64_t fingerprint_columns(const FingerprintTask& task, int device);
void fingerprint_cuda(const FingerprintTask& task, int device, void* stream, uint64_t* sums);

void records_cuda(const QuantizeTask& task, int device, void* stream);
void records_cuda(const MeanTask& task, int device, void* stream);
void records_cuda(const DequantizeTask& task, int device, void* stream);
void records_cuda(const CarryTask& task, int device, void* stream);

// Whether the kernels of this module can run on `device`. Launches nothing.
struct CudaStatus {
  const char* error;    // the name of the CUDA error, "" if there is none
  int driver, runtime;  // CUDA versions as 1000 major + 10 minor; driver is 0 where there is none
};

CudaStatus status_cuda(int device);

}  // namespace deslo
