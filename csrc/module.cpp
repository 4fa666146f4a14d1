// deslo_plugin._C: importing it adds CPU (and CUDA) implementations to the operators that deslo_plugin/ops.py defines.
#include <Python.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "cpu.h"
#include "operators.h"
#ifdef DESLO_CUDA
// Weak: a torch without CUDA has no such function, and no CUDA tensor to ask for it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace deslo {
namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  void (*single)(const Task<float>&, int64_t, int64_t);
  void (*twice)(const Task<double>&, int64_t, int64_t);
  void (*brief)(const Task<BFloat16>&, int64_t, int64_t);
  void (*drift)(const DriftTask&, int64_t, int64_t, double*);
  void (*land)(const LandTask&, int64_t, int64_t);
};

#define DESLO_KERNELS(isa) isa::update_blocks, isa::update_blocks, isa::update_blocks, isa::drift_blocks, isa::land_blocks

// From the widest to the one that every machine of the architecture has.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     DESLO_KERNELS(avx512)},
    {"avx2", [] { return bool(__builtin_cpu_supports("avx2")); }, DESLO_KERNELS(avx2)},
#endif
    {"baseline", [] { return true; }, DESLO_KERNELS(baseline)},
};

const Isa* widest() {
  const Isa* isa = kIsas;
  while (!isa->supported()) ++isa;
  return isa;
}

const Isa* chosen = widest();

// Each thread takes a contiguous run of blocks. Elements do not depend on one another, so their number changes no bit.
struct Cpu {
  static constexpr bool kHostReads = true;
  static constexpr int64_t kGrain = 32768 / kBlock;  // below about 30 microseconds of work a second thread costs more

  template <typename S>
  static void run(const Task<S>& task, const Tensor&) {
    if (task.found_inf && *task.found_inf != 0.0f) return;
    const Isa& isa = *chosen;
    torch::stable::parallel_for(0, task.blocks, kGrain, [&](int64_t begin, int64_t end) {
      if constexpr (kDtype<S> == Dtype::kFloat32) {
        isa.single(task, begin, end);
      } else if constexpr (kDtype<S> == Dtype::kFloat64) {
        isa.twice(task, begin, end);
      } else {
        isa.brief(task, begin, end);
      }
    });
  }

  // Blocks are added up in their order, whoever summed them.
  static Tensor drift(const DriftTask& task, const Tensor& like) {
    const Isa& isa = *chosen;
    std::vector<double> blocks(task.blocks * kSums);
    torch::stable::parallel_for(0, task.blocks, kGrain * kBlock / kDriftBlock, [&](int64_t begin, int64_t end) {
      isa.drift(task, begin, end, blocks.data() + begin * kSums);
    });
    Tensor sums = zero_sums(like, 1);
    double* const to = static_cast<double*>(sums.mutable_data_ptr());
    for (size_t i = 0; i < blocks.size(); ++i) to[i % kSums] += blocks[i];
    return sums;
  }

  static void land(const LandTask& task, const Tensor&) {
    const Isa& isa = *chosen;
    torch::stable::parallel_for(0, task.blocks, kGrain, [&](int64_t begin, int64_t end) { isa.land(task, begin, end); });
  }
};

STABLE_TORCH_LIBRARY_IMPL(deslo, CPU, library) { implement<Cpu>(library); }

#ifdef DESLO_CUDA
struct Cuda {
  static constexpr bool kHostReads = false;

  template <typename S>
  static void run(const Task<S>& task, const Tensor& like) {
    const int32_t device = like.get_device_index();
    const Tensor prepared = room_for_prepared(task, like);
    update_cuda(task, device, stream(device), static_cast<Prepared<S>*>(prepared.mutable_data_ptr()));
  }

  static Tensor drift(const DriftTask& task, const Tensor& like) {
    const int32_t device = like.get_device_index();
    const Tensor sums = zero_sums(like, drift_columns(device));
    drift_cuda(task, device, stream(device), static_cast<double*>(sums.mutable_data_ptr()));
    return sums;
  }

  static void land(const LandTask& task, const Tensor& like) {
    land_cuda(task, like.get_device_index(), stream(like.get_device_index()));
  }

 private:
  static void* stream(int32_t device) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    return current;
  }
};

STABLE_TORCH_LIBRARY_IMPL(deslo, CUDA, library) { implement<Cuda>(library); }
#endif

// isa(name=None) -> str: the instruction set of the CPU kernels, after switching to `name` if it is given.
PyObject* isa(PyObject*, PyObject* arguments) {
  const char* name = nullptr;
  if (!PyArg_ParseTuple(arguments, "|s", &name)) return nullptr;
  if (name) {
    for (const Isa& candidate : kIsas) {
      if (!std::strcmp(candidate.name, name) && candidate.supported()) {
        chosen = &candidate;
        return PyUnicode_FromString(name);
      }
    }
    return PyErr_Format(PyExc_ValueError, "isa: expected one that this machine has, got '%s'", name);
  }
  return PyUnicode_FromString(chosen->name);
}

PyMethodDef kMethods[] = {{"isa", isa, METH_VARARGS, "Instruction set of the CPU kernels."}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_C", "Native kernels of deslo_plugin.", -1, kMethods,
                       nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace deslo

PyMODINIT_FUNC PyInit__C() {
  PyObject* const module = PyModule_Create(&deslo::kModule);
#ifdef DESLO_CUDA
  const char* const backends = "cpu+cuda";
#else
  const char* const backends = "cpu";
#endif
  if (module && PyModule_AddStringConstant(module, "backends", backends) < 0) return nullptr;
  return module;
}
