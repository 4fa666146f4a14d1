// The CUDA kernel as the host sees it, on plain pointers: cuda.cu knows nothing of torch.
#pragma once

#include "task.h"

namespace deslo {

// Queues the task on `stream` (a cudaStream_t) of `device`. Throws std::runtime_error if the launch fails.
void update_cuda(const Task<float>& task, int device, void* stream);
void update_cuda(const Task<double>& task, int device, void* stream);

}  // namespace deslo
