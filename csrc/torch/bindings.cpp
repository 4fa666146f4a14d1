// deslo_plugin._C: importing it implements the operators of deslo_plugin/kernels/ for CPU, and for CUDA if it was
// built.
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstring>

#include "../cpu/kernels.h"
#include "operators.h"
#ifdef DESLO_CUDA
#include <dlfcn.h>
#endif

namespace deslo {
namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  void (*update_f32)(const UpdateTask<float>&, int64_t, int64_t);
  void (*update_f64)(const UpdateTask<double>&, int64_t, int64_t);
  void (*update_bf16)(const UpdateTask<BFloat16>&, int64_t, int64_t);
  void (*drift)(const DriftTask&, int64_t, int64_t, double*);
  void (*land)(const LandTask&, int64_t, int64_t);
  uint64_t (*fingerprint)(const FingerprintTask&, int64_t, int64_t);
  void (*quantize)(const QuantizeTask&, int64_t, int64_t);
  void (*mean)(const MeanTask&, int64_t, int64_t);
  void (*dequantize)(const DequantizeTask&, int64_t, int64_t);
  void (*carry)(const CarryTask&, int64_t, int64_t);

  void run_records(const QuantizeTask& task, int64_t begin, int64_t end) const { quantize(task, begin, end); }
  void run_records(const MeanTask& task, int64_t begin, int64_t end) const { mean(task, begin, end); }
  void run_records(const DequantizeTask& task, int64_t begin, int64_t end) const { dequantize(task, begin, end); }
  void run_records(const CarryTask& task, int64_t begin, int64_t end) const { carry(task, begin, end); }
};

#define DESLO_KERNELS(isa)                                                                         \
  isa::update_blocks, isa::update_blocks, isa::update_blocks, isa::drift_blocks, isa::land_blocks, \
      isa::fingerprint_blocks, isa::record_blocks, isa::record_blocks, isa::record_blocks, isa::record_blocks

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

const Isa* find_widest_isa() {
  const Isa* isa = kIsas;
  while (!isa->supported()) ++isa;
  return isa;
}

const Isa* active_isa = find_widest_isa();

// Each thread takes a contiguous run of blocks. Elements do not depend on one another, so their number changes no bit.
struct Cpu {
  static constexpr bool kHostReads = true;
  static constexpr int64_t kGrain = 32768 / kBlock;  // below about 30 microseconds of work a second thread costs more

  template <typename S>
  static void run(const UpdateTask<S>& task, const Tensor&) {
    if (task.found_inf && *task.found_inf != 0.0f) return;
    const Isa& isa = *active_isa;
    torch::stable::parallel_for(0, task.blocks, kGrain, [&](int64_t begin, int64_t end) {
      if constexpr (kDtype<S> == Dtype::kFloat32) {
        isa.update_f32(task, begin, end);
      } else if constexpr (kDtype<S> == Dtype::kFloat64) {
        isa.update_f64(task, begin, end);
      } else {
        isa.update_bf16(task, begin, end);
      }
    });
  }

  // The sums of blocks are added in the order of blocks, so the number of threads changes no bit.
  static Tensor drift(const DriftTask& task, const Tensor& like) {
    const Isa& isa = *active_isa;
    std::vector<double> blocks(task.blocks * kSums);
    torch::stable::parallel_for(0, task.blocks, kGrain * kBlock / kDriftBlock, [&](int64_t begin, int64_t end) {
      isa.drift(task, begin, end, blocks.data() + begin * kSums);
    });
    Tensor sums = make_zero_sums(like, 1);
    double* const to = static_cast<double*>(sums.mutable_data_ptr());
    for (size_t i = 0; i < blocks.size(); ++i) to[i % kSums] += blocks[i];
    return sums;
  }

  static void land(const LandTask& task, const Tensor&) {
    const Isa& isa = *active_isa;
    torch::stable::parallel_for(0, task.blocks, kGrain,
                                [&](int64_t begin, int64_t end) { isa.land(task, begin, end); });
  }

  // Integers: the order of the threads changes no bit.
  static Tensor fingerprint(const FingerprintTask& task, const Tensor& like) {
    const Isa& isa = *active_isa;
    std::atomic<uint64_t> sum{0};
    torch::stable::parallel_for(0, task.blocks, 4 * kGrain * kBlock / kColumns,
                                [&](int64_t begin, int64_t end) { sum += isa.fingerprint(task, begin, end); });
    const Tensor words = make_zero_words(like, 1);
    *static_cast<uint64_t*>(words.mutable_data_ptr()) = sum;
    return words;
  }

  // Of the rows of a QuantizeTask some hold no tensor's elements.
  static int64_t count_rows(const QuantizeTask& task) { return task.rows; }
  template <class Task>
  static int64_t count_rows(const Task& task) {
    return task.blocks;
  }

  template <class Task>
  static void run_records(const Task& task, const Tensor&) {
    const Isa& isa = *active_isa;
    torch::stable::parallel_for(0, count_rows(task), kGrain * kBlock / kRecordBlock,
                                [&](int64_t begin, int64_t end) { isa.run_records(task, begin, end); });
  }
};

STABLE_TORCH_LIBRARY_IMPL(deslo, CPU, library) { register_operators<Cpu>(library); }

#ifdef DESLO_CUDA
using torch::stable::accelerator::DeviceGuard;
using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// torch's function for the current stream, null in a torch without CUDA. It is looked up where torch lies in this
// process: a symbol that the linker leaves open would be null in silence, and the first step would call it.
CurrentStream find_current_stream_function() {
  static const CurrentStream found = []() -> CurrentStream {
    for (const char* const name : {"libtorch_cuda.so", "libtorch.so"}) {
      void* const library = dlopen(name, RTLD_NOLOAD | RTLD_LAZY);
      void* const symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
      if (symbol) return reinterpret_cast<CurrentStream>(symbol);
    }
    return nullptr;
  }();
  return found;
}

// Every call makes the device of its tensors current, through torch: the kernels' own runtime follows the driver.
struct Cuda {
  static constexpr bool kHostReads = false;

  template <typename S>
  static void run(const UpdateTask<S>& task, const Tensor& like) {
    const int32_t device = like.get_device_index();
    const DeviceGuard guard(device);
    const Tensor prepared = allocate_prepared(task, like);
    update_cuda(task, device, get_current_stream(device), static_cast<PreparedUpdate<S>*>(prepared.mutable_data_ptr()));
  }

  static Tensor drift(const DriftTask& task, const Tensor& like) {
    const int32_t device = like.get_device_index();
    const DeviceGuard guard(device);
    const Tensor sums = make_zero_sums(like, drift_columns(device));
    drift_cuda(task, device, get_current_stream(device), static_cast<double*>(sums.mutable_data_ptr()));
    return sums;
  }

  static void land(const LandTask& task, const Tensor& like) {
    const int32_t device = like.get_device_index();
    const DeviceGuard guard(device);
    land_cuda(task, device, get_current_stream(device));
  }

  static Tensor fingerprint(const FingerprintTask& task, const Tensor& like) {
    const int32_t device = like.get_device_index();
    const DeviceGuard guard(device);
    const Tensor sums = make_zero_words(like, fingerprint_columns(task, device));
    fingerprint_cuda(task, device, get_current_stream(device), static_cast<uint64_t*>(sums.mutable_data_ptr()));
    return sums;
  }

  template <class Task>
  static void run_records(const Task& task, const Tensor& like) {
    const int32_t device = like.get_device_index();
    const DeviceGuard guard(device);
    records_cuda(task, device, get_current_stream(device));
  }

 private:
  static void* get_current_stream(int32_t device) {
    const CurrentStream function = find_current_stream_function();
    if (!function) {
      throw std::runtime_error(
          "deslo: this torch does not say which CUDA stream is current: expected aoti_torch_get_current_cuda_stream in "
          "libtorch_cuda.so, found none; install a CUDA build of torch 2.10 or newer, or set DESLO_NATIVE=cpu and "
          "install deslo_plugin again");
    }
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(function(device, &current));
    return current;
  }
};

STABLE_TORCH_LIBRARY_IMPL(deslo, CUDA, library) { register_operators<Cuda>(library); }

// cuda_status(device) -> (error, driver, runtime): the name of the CUDA error that a kernel of this module would meet
// on the device, "" if none; and the CUDA versions of the driver and of the runtime in this module, as 1000 major + 10
// minor.
PyObject* cuda_status(PyObject*, PyObject* arguments) {
  int device = 0;
  if (!PyArg_ParseTuple(arguments, "i", &device)) return nullptr;
  try {
    const DeviceGuard guard(device);
    const CudaStatus status = status_cuda(device);
    const char* const error = *status.error || find_current_stream_function() ? status.error : "no current stream";
    return Py_BuildValue("sii", error, status.driver, status.runtime);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}
#endif

// isa(name=None) -> str: the instruction set of the CPU kernels, after switching to `name` if it is given.
PyObject* isa(PyObject*, PyObject* arguments) {
  const char* name = nullptr;
  if (!PyArg_ParseTuple(arguments, "|s", &name)) return nullptr;
  if (name) {
    for (const Isa& candidate : kIsas) {
      if (!std::strcmp(candidate.name, name) && candidate.supported()) {
        active_isa = &candidate;
        return PyUnicode_FromString(name);
      }
    }
    return PyErr_Format(PyExc_ValueError, "isa: expected one that this machine has, got '%s'", name);
  }
  return PyUnicode_FromString(active_isa->name);
}

PyMethodDef kMethods[] = {
    {"isa", isa, METH_VARARGS, "Instruction set of the CPU kernels."},
#ifdef DESLO_CUDA
    {"cuda_status", cuda_status, METH_VARARGS, "Whether the CUDA kernels run on a device."},
#endif
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "_C", "Native kernels of deslo_plugin.", -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace deslo

PyMODINIT_FUNC PyInit__C() {
  PyObject* const module = PyModule_Create(&deslo::kModule);
#ifdef DESLO_CUDA
  const char* const backends = "cpu+cuda";
  const char* const architectures = DESLO_CUDA;  // as TORCH_CUDA_ARCH_LIST has them
#else
  const char* const backends = "cpu";
  const char* const architectures = "";
#endif
  if (module && (PyModule_AddStringConstant(module, "backends", backends) < 0 ||
                 PyModule_AddStringConstant(module, "architectures", architectures) < 0)) {
    return nullptr;
  }
  return module;
}
