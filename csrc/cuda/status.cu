// Whether the CUDA kernels of this module can run: they are all compiled for the architectures of this file.
#include <cuda_runtime.h>

#include "kernels.h"

namespace deslo {
namespace {

__global__ void probe() {}

cudaError_t first_error(int device) {
  int current = -1;
  if (const cudaError_t error = cudaGetDevice(&current); error != cudaSuccess) return error;
  if (current != device) return cudaErrorInvalidDevice;
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, probe);  // loads the code, or compiles its PTX
}

}  // namespace

CudaStatus status_cuda(int device) {
  CudaStatus status{"", 0, 0};
  cudaDriverGetVersion(&status.driver);
  cudaRuntimeGetVersion(&status.runtime);
  if (const cudaError_t error = first_error(device); error != cudaSuccess) status.error = cudaGetErrorName(error);
  return status;
}

}  // namespace deslo
