// The CUDA operators on CPU tensors, under the name deslo_emulated: csrc/cuda.cu as tests/emulation/cuda_runtime.h runs it.
#include "../../csrc/operators.h"

#include "../../csrc/cuda.cu"

namespace deslo {

struct Emulated {
  template <typename T>
  static void run(const Task<T>& task, int32_t device) {
    update_cuda(task, device, nullptr);
  }
};

STABLE_TORCH_LIBRARY_IMPL(deslo_emulated, CPU, library) { implement<Emulated>(library); }

}  // namespace deslo
