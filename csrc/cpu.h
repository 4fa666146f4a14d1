// The CPU kernel as each instruction set has it.
#pragma once

#include "task.h"

namespace deslo {

#define DESLO_DECLARE_ISA(isa)                                                   \
  namespace isa {                                                                \
  void update_blocks(const Task<float>& task, int64_t begin, int64_t end);       \
  void update_blocks(const Task<double>& task, int64_t begin, int64_t end);      \
  }

DESLO_DECLARE_ISA(baseline)
DESLO_DECLARE_ISA(avx2)
DESLO_DECLARE_ISA(avx512)

}  // namespace deslo
