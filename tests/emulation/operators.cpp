// The CUDA operators on CPU tensors, under the name deslo_emulated: csrc/cuda/*.cu with the cuda_runtime.h of this
// folder.
#include "../../csrc/torch/operators.h"

#include "../../csrc/cuda/delayed_update.cu"
#include "../../csrc/cuda/drift.cu"
#include "../../csrc/cuda/fingerprint.cu"
#include "../../csrc/cuda/quantize.cu"
#include "../../csrc/cuda/update.cu"

namespace deslo {

struct Emulated {
  static constexpr bool kHostReads = false;

  template <typename S>
  static void run(const UpdateTask<S>& task, const Tensor& like) {
    const Tensor prepared = allocate_prepared(task, like);
    update_cuda(task, 0, nullptr, static_cast<PreparedUpdate<S>*>(prepared.mutable_data_ptr()));
  }

  static Tensor drift(const DriftTask& task, const Tensor& like) {
    const Tensor sums = make_zero_sums(like, drift_columns(0));
    drift_cuda(task, 0, nullptr, static_cast<double*>(sums.mutable_data_ptr()));
    return sums;
  }

  static void land(const LandTask& task, const Tensor&) { land_cuda(task, 0, nullptr); }

  static Tensor fingerprint(const FingerprintTask& task, const Tensor& like) {
    const Tensor sums = make_zero_words(like, fingerprint_columns(task, 0));
    fingerprint_cuda(task, 0, nullptr, static_cast<uint64_t*>(sums.mutable_data_ptr()));
    return sums;
  }

  template <class Task>
  static void run_records(const Task& task, const Tensor&) {
    records_cuda(task, 0, nullptr);
  }
};

STABLE_TORCH_LIBRARY_IMPL(deslo_emulated, CPU, library) { register_operators<Emulated>(library); }

}  // namespace deslo
