// Runs the CPU kernels and the emulated CUDA kernels side by side on buffers that end where their tensors end, for a
// build with -fsanitize=address,undefined. Exits with 1 if the two differ: in a bit, or for sums in their order.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cuda/delayed_update.cu"
#include "../../csrc/cuda/drift.cu"
#include "../../csrc/cuda/fingerprint.cu"
#include "../../csrc/cuda/quantize.cu"
#include "../../csrc/cuda/update.cu"

using namespace deslo;

namespace {

struct Buffer {
  Buffer(int64_t numel, Dtype type, unsigned seed)
      : bytes(numel * (type == Dtype::kFloat64   ? 8
                       : type == Dtype::kFloat32 ? 4
                                                 : 2)),
        data(new unsigned char[bytes]) {
    std::srand(seed);
    for (int64_t i = 0; i < numel; ++i) {
      const float a = float(std::rand() % 2001) / 1000;
      switch (type) {
        case Dtype::kFloat32: reinterpret_cast<float*>(data.get())[i] = a; break;
        case Dtype::kFloat64: reinterpret_cast<double*>(data.get())[i] = a; break;
        case Dtype::kBFloat16: reinterpret_cast<BFloat16*>(data.get())[i] = BFloat16::from_float(a); break;
        case Dtype::kFloat16: reinterpret_cast<Float16*>(data.get())[i] = Float16::from_float(a); break;
      }
    }
  }

  int64_t bytes;
  std::unique_ptr<unsigned char[]> data;
};

// Everything that a call has written.
template <typename S, typename Update>
std::vector<unsigned char> run(Rule rule, int momenta, double clip_value, Update update) {
  std::vector<Buffer> buffers;
  std::vector<ParamSlot<S>> slots;
  std::vector<S*> u;
  UpdateTask<S> task{};
  const auto made = [&](int64_t numel, Dtype type) {
    buffers.emplace_back(numel, type, unsigned(buffers.size()));
    return static_cast<void*>(buffers.back().data.get());
  };
  const Dtype types[] = {kDtype<Arithmetic<S>>, Dtype::kBFloat16, Dtype::kFloat16};
  int kind = 0;
  for (const int64_t numel : {1, 3, 63, 64, 65, 1023, 1025, 5000}) {
    const Dtype type = sizeof(S) == 8 ? kDtype<S> : types[kind++ % 3];
    ParamSlot<S> slot{made(numel, type), made(numel, type), nullptr, nullptr, numel, task.blocks, type, type, type};
    if (rule != Rule::kSgdm) slot.v = static_cast<S*>(made(numel, kDtype<S>));
    if (kind % 2) slot.copy = made(numel, type);
    slots.push_back(slot);
    for (int j = 0; j < momenta; ++j) u.push_back(static_cast<S*>(made(numel, kDtype<S>)));
    task.blocks += (numel + kBlock - 1) / kBlock;
  }
  task.hyper = {rule, true, momenta, 3, 0.01, 0.1, 0.99, 1e-8, clip_value, {}, {}};
  for (int j = 0; j < momenta; ++j) task.hyper.beta[j] = 0.9, task.hyper.weight[j] = 0.5 / momenta;
  task.coefficients = make_coefficients<S>(task.hyper);
  task.slots = slots.data();
  task.u = u.data();
  task.slot_count = int64_t(slots.size());
  update(task);
  std::vector<unsigned char> written;
  for (const Buffer& buffer : buffers)
    written.insert(written.end(), buffer.data.get(), buffer.data.get() + buffer.bytes);
  return written;
}

template <typename S>
bool agree(Rule rule, int momenta, double clip_value) {
  const auto on_cpu = run<S>(rule, momenta, clip_value, [](const UpdateTask<S>& task) {
    baseline::update_blocks(task, 0, task.blocks / 2);
    baseline::update_blocks(task, task.blocks / 2, task.blocks);
  });
  const auto on_gpu =
      run<S>(rule, momenta, clip_value, [](const UpdateTask<S>& task) { update_cuda(task, 0, nullptr, nullptr); });
  const auto prepared = run<S>(rule, momenta, clip_value, [](UpdateTask<S> task) {
    const int64_t t = task.hyper.t;
    const double lr = task.hyper.lr;
    PreparedUpdate<S> room{};
    task.lr = &lr;
    task.hyper.lr = 7;
    if (task.hyper.rule != Rule::kAdoptStart) task.t = &t, task.hyper.t = 77;  // a first step is known by its t
    update_cuda(task, 0, nullptr, &room);
  });
  return on_cpu == on_gpu && on_cpu == prepared;
}

bool agree_on_drift() {
  std::vector<Buffer> buffers;
  std::vector<Pair> pairs;
  DriftTask task{};
  for (const int64_t numel : {1, 3, 63, 64, 65, 4095, 4097, 9000}) {
    for (const Dtype local : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
      for (const Dtype mean : {Dtype::kFloat32, Dtype::kFloat64}) {
        buffers.emplace_back(numel, local, unsigned(buffers.size()));
        void* const data = buffers.back().data.get();
        buffers.emplace_back(numel, mean, unsigned(buffers.size()));
        pairs.push_back({data, buffers.back().data.get(), numel, task.blocks, local, mean});
        task.blocks += (numel + kDriftBlock - 1) / kDriftBlock;
      }
    }
  }
  task.pairs = pairs.data();
  task.pair_count = int64_t(pairs.size());
  std::vector<double> on_cpu(kSums * task.blocks), on_gpu(kSums * drift_columns(0));
  baseline::drift_blocks(task, 0, task.blocks / 2, on_cpu.data());
  baseline::drift_blocks(task, task.blocks / 2, task.blocks, on_cpu.data() + kSums * (task.blocks / 2));
  drift_cuda(task, 0, nullptr, on_gpu.data());
  for (int k = 0; k < kSums; ++k) {
    double blocks = 0, columns = 0;
    for (int64_t i = 0; i < task.blocks; ++i) blocks += on_cpu[i * kSums + k];
    for (int64_t i = 0; i < drift_columns(0); ++i) columns += on_gpu[k * drift_columns(0) + i];
    if (!(blocks > 0) || std::fabs(blocks - columns) > 1e-12 * blocks) return false;
  }
  return true;
}

// What x is after a landing by `land`.
template <typename Land>
std::vector<unsigned char> landed(Land land) {
  std::vector<Buffer> buffers;
  std::vector<Landing> landings;
  LandTask task{0.7, nullptr, 0, 0};
  const auto made = [&](int64_t numel, Dtype type) {
    buffers.emplace_back(numel, type, unsigned(buffers.size()));
    return static_cast<void*>(buffers.back().data.get());
  };
  for (const int64_t numel : {1, 3, 63, 64, 65, 1023, 1025, 5000}) {
    for (const Dtype x : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
      for (const Dtype mean : {Dtype::kFloat32, Dtype::kFloat64}) {
        if (x == Dtype::kFloat64 && mean == Dtype::kFloat32) continue;
        landings.push_back({made(numel, x), made(numel, mean), made(numel, mean), numel, task.blocks, x, mean});
        task.blocks += (numel + kBlock - 1) / kBlock;
      }
    }
  }
  task.landings = landings.data();
  task.count = int64_t(landings.size());
  land(task);
  std::vector<unsigned char> written;
  for (const Buffer& buffer : buffers)
    written.insert(written.end(), buffer.data.get(), buffer.data.get() + buffer.bytes);
  return written;
}

bool agree_on_landing() {
  const auto on_cpu = landed([](const LandTask& task) {
    baseline::land_blocks(task, 0, task.blocks / 3);
    baseline::land_blocks(task, task.blocks / 3, task.blocks);
  });
  return on_cpu == landed([](const LandTask& task) { land_cuda(task, 0, nullptr); });
}

bool agree_on_fingerprint() {
  std::vector<std::vector<unsigned char>> buffers;
  std::vector<Span> spans;
  FingerprintTask task{};
  for (const int64_t bytes : {1, 2, 3, 4, 15, 16, 17, 4095, 16383, 16384, 16385, 40000, 40002}) {
    for (const int64_t offset : {0, 1, 2, 4, 8}) {
      buffers.emplace_back(bytes + offset);
      for (unsigned char& byte : buffers.back()) byte = (unsigned char)(std::rand());
      spans.push_back({buffers.back().data() + offset, bytes, task.blocks});
      task.blocks += (bytes + kBlockBytes - 1) / kBlockBytes;
    }
  }
  task.spans = spans.data();
  task.count = int64_t(spans.size());
  std::vector<uint64_t> sums(fingerprint_columns(task, 0));
  fingerprint_cuda(task, 0, nullptr, sums.data());
  uint64_t on_gpu = 0;
  for (const uint64_t sum : sums) on_gpu += sum;
  const int64_t half = task.blocks / 2;
  const uint64_t on_cpu =
      baseline::fingerprint_blocks(task, 0, half) + baseline::fingerprint_blocks(task, half, task.blocks);
  return on_cpu == on_gpu;
}

// Everything that the four operators of one format have written, one after the other. `run` runs a task of theirs.
template <typename Run>
std::vector<unsigned char> passed_in_few_bits(int64_t format, int64_t record_bytes, Run run) {
  constexpr int64_t kReplicas = 3, kRank = 1;
  std::vector<Buffer> buffers;
  std::vector<RecordSlot> slots;
  const auto made = [&](int64_t numel) {
    buffers.emplace_back(numel, Dtype::kFloat32, unsigned(buffers.size()));
    return reinterpret_cast<float*>(buffers.back().data.get());
  };
  int64_t blocks = 0;
  for (const int64_t numel : {1, 3, 127, 128, 129, 1000}) {
    for (const Dtype type : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
      buffers.emplace_back(numel, type, unsigned(buffers.size()));
      const void* const value = buffers.back().data.get();
      float* const error = numel % 2 ? made(numel) : nullptr;
      slots.push_back({value, made(numel), error, made(numel), numel, blocks, type});
      blocks += (numel + kRecordBlock - 1) / kRecordBlock;
    }
  }
  const int64_t part = blocks / kReplicas + 1, rows = kReplicas * part;
  std::vector<std::vector<unsigned char>> records(2, std::vector<unsigned char>(rows * record_bytes));
  float* const own = made(part * kRecordBlock);
  float* const weights = made(kReplicas);
  const RecordTask task{slots.data(), int64_t(slots.size()), blocks, format};
  run(QuantizeTask{task, rows, records[0].data(), own, kRank * part, part}, rows);
  run(MeanTask{format, part, kReplicas, kRank, records[0].data(), weights, own, records[1].data()}, part);
  run(DequantizeTask{task, records[0].data()}, blocks);
  run(CarryTask{task, records[0].data(), own, kReplicas, part, kRank}, blocks);
  std::vector<unsigned char> written = records[0];
  written.insert(written.end(), records[1].begin(), records[1].end());
  for (const Buffer& buffer : buffers)
    written.insert(written.end(), buffer.data.get(), buffer.data.get() + buffer.bytes);
  return written;
}

bool agree_in_few_bits(int64_t format) {
  int64_t bytes = 0;
  with_format(format, [&](auto found) { bytes = decltype(found)::kRecordBytes; });
  const auto on_cpu = passed_in_few_bits(format, bytes, [](const auto& task, int64_t rows) {
    baseline::record_blocks(task, 0, rows / 2);
    baseline::record_blocks(task, rows / 2, rows);
  });
  return on_cpu == passed_in_few_bits(format, bytes, [](const auto& task, int64_t) { records_cuda(task, 0, nullptr); });
}

}  // namespace

int main() {
  for (int64_t format = 0; format < 7; ++format) {
    if (!agree_in_few_bits(format)) {
      std::printf("format %d: CPU and CUDA differ\n", int(format));
      return 1;
    }
  }
  if (!agree_on_fingerprint()) {
    std::printf("fingerprint: CPU and CUDA differ\n");
    return 1;
  }
  if (!agree_on_landing()) {
    std::printf("landing: CPU and CUDA differ\n");
    return 1;
  }
  if (!agree_on_drift()) {
    std::printf("drift: CPU and CUDA differ\n");
    return 1;
  }
  for (const Rule rule : {Rule::kSgdm, Rule::kAdam, Rule::kAdopt, Rule::kAdoptStart}) {
    for (int momenta = rule == Rule::kAdoptStart ? 0 : 1; momenta <= (rule == Rule::kAdoptStart ? 0 : 6); ++momenta) {
      for (const double clip_value : {0.0, 0.5}) {
        if (!agree<float>(rule, momenta, clip_value) || !agree<double>(rule, momenta, clip_value) ||
            !agree<BFloat16>(rule, momenta, clip_value)) {
          std::printf("rule %d with %d momenta: CPU and CUDA differ\n", int(rule), momenta);
          return 1;
        }
      }
    }
  }
}
