// The CUDA kernels as the host sees them, on plain pointers: the .cu files know nothing of torch.
#pragma once

#include "drift.h"

namespace deslo {

// Queues the task on `stream` (a cudaStream_t) of `device`. Throws std::runtime_error if the launch fails.
void update_cuda(const Task<float>& task, int device, void* stream);
void update_cuda(const Task<double>& task, int device, void* stream);
void update_cuda(const Task<BFloat16>& task, int device, void* stream);

// Likewise: adds to `sums`, kSums rows of drift_columns(device) numbers each. The columns add up to the result.
int64_t drift_columns(int device);
void drift_cuda(const DriftTask& task, int device, void* stream, double* sums);

}  // namespace deslo
