// The CPU kernels as each instruction set has them.
#pragma once

#include "../delayed_update.h"
#include "../drift.h"
#include "../fingerprint.h"
#include "../quantize.h"

namespace deslo {

// drift_blocks writes the sums of each block of begin..end to `sums`, one block after the other.
#define DESLO_DECLARE_ISA(isa)                                                          \
  namespace isa {                                                                       \
  void update_blocks(const UpdateTask<float>& task, int64_t begin, int64_t end);        \
  void update_blocks(const UpdateTask<double>& task, int64_t begin, int64_t end);       \
  void update_blocks(const UpdateTask<BFloat16>& task, int64_t begin, int64_t end);     \
  void drift_blocks(const DriftTask& task, int64_t begin, int64_t end, double* sums);   \
  void land_blocks(const LandTask& task, int64_t begin, int64_t end);                   \
  uint64_t fingerprint_blocks(const FingerprintTask& task, int64_t begin, int64_t end); \
  void record_blocks(const QuantizeTask& task, int64_t begin, int64_t end);             \
  void record_blocks(const MeanTask& task, int64_t begin, int64_t end);                 \
  void record_blocks(const DequantizeTask& task, int64_t begin, int64_t end);           \
  void record_blocks(const CarryTask& task, int64_t begin, int64_t end);                \
  }

DESLO_DECLARE_ISA(baseline)
DESLO_DECLARE_ISA(avx2)
DESLO_DECLARE_ISA(avx512)

}  // namespace deslo
