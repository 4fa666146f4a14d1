// Checks that all operators share. An error names the argument.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../numbers.h"

namespace deslo {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using ScalarType = torch::headeronly::ScalarType;

// Raises ValueError in Python.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message << "deslo: ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline std::string format_shape(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::ostringstream text;
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "[") << sizes[i];
  return sizes.empty() ? "[]" : text.str() + "]";
}

// The name of an argument, or of one tensor of a list. It becomes text only in an error, since a step names thousands.
struct ArgumentName {
  const char* list;
  size_t index = size_t(-1);
};

inline std::ostream& operator<<(std::ostream& to, const ArgumentName& name) {
  return name.index == size_t(-1) ? to << name.list : to << name.list << '[' << name.index << ']';
}

inline ArgumentName name_of(const char* list, size_t index) { return {list, index}; }

const char* const kDtypeNames[] = {"float32", "float64", "bfloat16", "float16"};  // by Dtype

inline Dtype dtype_of(const Tensor& tensor, const ArgumentName& name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: refuse(name, ": expected float32, float64, bfloat16 or float16, got another dtype");
  }
}

inline bool are_equal(torch::headeronly::IntHeaderOnlyArrayRef a, torch::headeronly::IntHeaderOnlyArrayRef b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

// Whether the elements fill one range of memory, in whatever order of dimensions.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether equal offsets from the first element mean equal indices. Both tensors are dense and of one shape.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  if (are_equal(a.strides(), b.strides()) || (a.is_contiguous() && b.is_contiguous())) return true;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

inline size_t element_size(Dtype type) { return type == Dtype::kFloat64 ? 8 : type == Dtype::kFloat32 ? 4 : 2; }

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// The memory of one argument.
struct MemoryRange {
  const char *begin, *end;
  const char* name;
  size_t index;
  bool written;
};

inline void refuse_overlap(const std::vector<MemoryRange>& ranges) {
  std::vector<std::pair<const char*, const MemoryRange*>> ordered;  // small to move: a step sorts thousands
  ordered.reserve(ranges.size());
  for (const MemoryRange& range : ranges) ordered.emplace_back(range.begin, &range);
  std::sort(ordered.begin(), ordered.end());
  const MemoryRange* last_range = nullptr;    // of those so far, the one that ends last
  const MemoryRange* last_written = nullptr;  // of the written ones, the one that ends last
  for (const auto& [begin, range] : ordered) {
    const MemoryRange& next = *range;
    const MemoryRange* const other = next.written ? last_range : last_written;
    if (other && other->end > next.begin) {
      refuse(name_of(next.name, next.index), ": expected memory of its own, but it overlaps ",
             name_of(other->name, other->index));
    }
    if (!last_range || next.end > last_range->end) last_range = &next;
    if (next.written && (!last_written || next.end > last_written->end)) last_written = &next;
  }
}

}  // namespace deslo
