// Checks the arguments of deslo::quantize, mean_quantized, dequantize and carry_, and makes the tasks of their kernels.
// deslo_plugin/kernels/quantize_checks.py refuses the same in the same words.
#pragma once

#include "../quantize.h"
#include "argument_checks.h"

namespace deslo {

inline int64_t check_format(int64_t format) {
  int64_t bytes = 0;
  with_format(format, [&](auto found) { bytes = decltype(found)::kRecordBytes; });
  if (!bytes) refuse("format: expected one of 0, 1, 2, 3, 4, 5, 6, got ", format);
  return bytes;
}

inline void check_place(const ArgumentName& name, const Tensor& tensor, const ArgumentName& like_name,
                        const Tensor& like) {
  if (!same_device(tensor, like)) refuse(name, ": expected the device of ", like_name, ", got another");
  if (!tensor.is_contiguous()) refuse(name, ": expected a contiguous tensor");
}

// A tensor that is no list's. `shape` says which would fit.
template <typename... Parts>
void check_buffer(const char* name, const Tensor& tensor, ScalarType type, const ArgumentName& like_name,
                  const Tensor& like, bool fits, const Parts&... shape) {
  check_place({name}, tensor, like_name, like);
  const bool other = tensor.scalar_type() != type;
  if (!other && fits) return;
  refuse(name, ": expected ", type == ScalarType::Byte ? "uint8" : "float32", " of shape ", shape..., ", got ",
         other ? "another dtype of shape " : "shape ", format_shape(tensor.sizes()));
}

inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  return tensor.dim() == int64_t(sizes.size()) && std::equal(sizes.begin(), sizes.end(), tensor.sizes().begin());
}

// The tensors of a call, with one slot for each that has elements.
class CheckedLists {
 public:
  // Lists other than `all` may be empty. `all` is called `name`, and may be of 16-bit formats if it is not written.
  CheckedLists(const char* name, const Tensors& all, bool written) : name_(name), all_(all) {
    if (all.empty()) refuse(name, ": expected one tensor or more, got an empty list");
    for (size_t i = 0; i < all.size(); ++i) types_.push_back(check_tensor(name, i, all[i], !written));
  }

  void check(const char* name, const Tensors& tensors) const {
    if (tensors.empty()) return;
    if (tensors.size() != all_.size()) {
      refuse(name, ": expected ", all_.size(), " tensors or none, got ", tensors.size());
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
      check_tensor(name, i, tensors[i], false);
      if (!are_equal(tensors[i].sizes(), all_[i].sizes())) {
        refuse(name_of(name, i), ": expected shape ", format_shape(all_[i].sizes()), " of ", name_of(name_, i),
               ", got ", format_shape(tensors[i].sizes()));
      }
    }
  }

  // The lists have been checked.
  RecordTask make_task(const Tensors& bases, const Tensors& errors, const Tensors& means, int64_t format) {
    const auto data = [](const Tensors& tensors, size_t i) {
      return tensors.empty() ? nullptr : static_cast<float*>(tensors[i].mutable_data_ptr());
    };
    int64_t blocks = 0;
    slots_.reserve(all_.size());
    for (size_t i = 0; i < all_.size(); ++i) {
      const int64_t numel = all_[i].numel();
      if (numel == 0) continue;
      slots_.push_back(
          {all_[i].const_data_ptr(), data(bases, i), data(errors, i), data(means, i), numel, blocks, types_[i]});
      blocks += (numel + kRecordBlock - 1) / kRecordBlock;
    }
    return {slots_.data(), int64_t(slots_.size()), blocks, format};
  }

 private:
  Dtype check_tensor(const char* name, size_t i, const Tensor& tensor, bool halves) const {
    check_place(name_of(name, i), tensor, name_of(name_, 0), all_[0]);
    switch (tensor.scalar_type()) {
      case ScalarType::Float: return Dtype::kFloat32;
      case ScalarType::BFloat16:
        if (halves) return Dtype::kBFloat16;
        break;
      case ScalarType::Half:
        if (halves) return Dtype::kFloat16;
        break;
      default: break;
    }
    refuse(name_of(name, i), ": expected float32", halves ? ", bfloat16 or float16" : "", ", got another dtype");
  }

  const char* name_;
  const Tensors& all_;
  std::vector<Dtype> types_;
  std::vector<RecordSlot> slots_;
};

inline uint8_t* bytes_of(const Tensor& tensor) { return static_cast<uint8_t*>(tensor.mutable_data_ptr()); }
inline float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

inline void check_rank(int64_t rank, int64_t replicas) {
  if (rank < 0 || rank >= replicas) refuse("rank: expected one of ", replicas, " replicas from 0 on, got ", rank);
}

// Rows of `records`, of which the blocks of tensors need so many.
inline void check_records(const Tensor& records, int64_t need, int64_t bytes, const char* like_name,
                          const Tensor& like) {
  const bool fits = records.dim() == 2 && records.size(0) >= need && records.size(1) == bytes;
  check_buffer("records", records, ScalarType::Byte, name_of(like_name, 0), like, fits, "[", need, " or more, ", bytes,
               "]");
}

class CheckedQuantize {
 public:
  CheckedQuantize(const Tensors& values, const Tensors& bases, const Tensors& errors, const Tensor& records,
                  const Tensor& own, int64_t first, int64_t format)
      : lists_("values", values, false) {
    const int64_t bytes = check_format(format);
    lists_.check("bases", bases);
    lists_.check("errors", errors);
    static_cast<RecordTask&>(task) = lists_.make_task(bases, errors, {}, format);
    check_records(records, task.blocks, bytes, "values", values[0]);
    task.rows = records.size(0);
    const bool fits = own.dim() == 2 && own.size(0) <= task.rows && own.size(1) == kRecordBlock;
    check_buffer("own", own, ScalarType::Float, name_of("values", 0), values[0], fits, "[", task.rows, " or fewer, ",
                 kRecordBlock, "]");
    task.own_rows = own.size(0);
    if (first < 0 || first > task.rows - task.own_rows) {
      refuse("first: expected 0 to ", task.rows - task.own_rows, ", got ", first);
    }
    task.first = first;
    task.records = bytes_of(records);
    task.own = floats_of(own);
  }

  QuantizeTask task;

 private:
  CheckedLists lists_;
};

inline MeanTask check_mean(const Tensor& received, const Tensor& own, const Tensor& weights, int64_t rank,
                           const Tensor& records, int64_t format) {
  const int64_t bytes = check_format(format);
  const ArgumentName like = {"own"};
  check_buffer("own", own, ScalarType::Float, like, own, own.dim() == 2 && own.size(1) == kRecordBlock, "[blocks, ",
               kRecordBlock, "]");
  const int64_t blocks = own.size(0);
  const bool fits = received.dim() == 3 && received.size(1) == blocks && received.size(2) == bytes;
  check_buffer("received", received, ScalarType::Byte, like, own, fits, "[replicas, ", blocks, ", ", bytes, "]");
  const int64_t replicas = received.size(0);
  check_buffer("weights", weights, ScalarType::Float, like, own, has_shape(weights, {replicas}), "[", replicas, "]");
  check_buffer("records", records, ScalarType::Byte, like, own, has_shape(records, {blocks, bytes}), "[", blocks, ", ",
               bytes, "]");
  check_rank(rank, replicas);
  return {format, blocks, replicas, rank, bytes_of(received), floats_of(weights), floats_of(own), bytes_of(records)};
}

class CheckedDequantize {
 public:
  CheckedDequantize(const Tensor& records, const Tensors& bases, const Tensors& means, int64_t format)
      : lists_("means", means, true) {
    const int64_t bytes = check_format(format);
    lists_.check("bases", bases);
    static_cast<RecordTask&>(task) = lists_.make_task(bases, {}, means, format);
    check_records(records, task.blocks, bytes, "means", means[0]);
    task.records = bytes_of(records);
  }

  DequantizeTask task;

 private:
  CheckedLists lists_;
};

class CheckedCarry {
 public:
  CheckedCarry(const Tensors& values, const Tensors& bases, const Tensors& errors, const Tensors& means,
               const Tensor& sent, const Tensor& own, int64_t rank, int64_t format)
      : lists_("values", values, false) {
    const int64_t bytes = check_format(format);
    lists_.check("bases", bases);
    lists_.check("errors", errors);
    lists_.check("means", means);
    static_cast<RecordTask&>(task) = lists_.make_task(bases, errors, means, format);
    const ArgumentName like = name_of("values", 0);
    const bool fits = sent.dim() == 4 && sent.size(3) == bytes && sent.numel() / bytes >= task.blocks;
    check_buffer("sent", sent, ScalarType::Byte, like, values[0], fits, "[copies, replicas, blocks, ", bytes, "] with ",
                 task.blocks, " blocks or more in all");
    check_buffer("own", own, ScalarType::Float, like, values[0],
                 has_shape(own, {sent.size(0), sent.size(2), kRecordBlock}), "[", sent.size(0), ", ", sent.size(2),
                 ", ", kRecordBlock, "]");
    check_rank(rank, sent.size(1));
    task.replicas = sent.size(1);
    task.part = sent.size(2);
    task.rank = rank;
    task.sent = bytes_of(sent);
    task.own = floats_of(own);
  }

  CarryTask task;

 private:
  CheckedLists lists_;
};

}  // namespace deslo
