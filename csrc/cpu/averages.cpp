// The CPU kernels of the averages, built once per instruction set as update.cpp is.
#include "blocks.h"

namespace deslo::DESLO_ISA {
namespace {

// Lane k of a block's sums gathers the elements k, k + kLanes, ...; at the end lanes are added one after the other. So
// the width of the registers changes no bit.
constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kWide = 8;
#elif defined(__AVX__)
constexpr int kWide = 4;
#else
constexpr int kWide = 2;
#endif

template <typename T>
struct Wide {
  typedef T Type __attribute__((vector_size(kWide * sizeof(T))));
};
using Doubles = Wide<double>::Type;

struct DriftSums {
  Doubles distance[kLanes / kWide], product[kLanes / kWide], square[kLanes / kWide];
};

template <typename T>
DESLO_INLINE Doubles load_doubles(const T* from) {
  typename Wide<T>::Type values;
  memcpy(&values, from, sizeof values);
  return __builtin_convertvector(values, Doubles);
}

// `length` is a multiple of kLanes. The copy of the sums stays in registers.
template <typename L, typename M>
DESLO_INLINE void drift_run(int64_t length, const L* local, const M* mean, DriftSums& sums) {
  DriftSums s = sums;
  for (int64_t e = 0; e < length; e += kLanes) {
#pragma GCC unroll 8
    for (int p = 0; p < kLanes / kWide; ++p) {
      const int64_t at = e + p * kWide;
      add_drift(load_doubles(local + at), load_doubles(mean + at), s.distance[p], s.product[p], s.square[p]);
    }
  }
  sums = s;
}

DESLO_INLINE double add_lanes(const Doubles* lanes) {
  double sum = 0;
  for (int k = 0; k < kLanes; ++k) sum += lanes[k / kWide][k % kWide];
  return sum;
}

// `count` elements from `offset`, a block or what is left of the tensor. L is float for the 16-bit formats too.
template <typename L, typename M>
void drift_block(const Pair& pair, int64_t offset, int64_t count, double* to) {
  DriftSums sums{};
  const int64_t in_place = pair.local_type == kDtype<L> ? count / kBlock * kBlock : 0;
  drift_run(in_place, static_cast<L*>(pair.local) + offset, static_cast<M*>(pair.mean) + offset, sums);
  Block<L> l_block{};
  Block<M> m_block{};
  for (int64_t e = in_place; e < count; e += kBlock) {
    const int64_t left = count - e < kBlock ? count - e : kBlock;
    if (left < kBlock) l_block = {}, m_block = {};  // zeros add nothing
    const L* const l = load(pair.local, pair.local_type, offset + e, left, l_block);
    const M* const m = load(pair.mean, kDtype<M>, offset + e, left, m_block);
    drift_run(kBlock, l, m, sums);
  }
  to[0] = add_lanes(sums.distance);
  to[1] = add_lanes(sums.product);
  to[2] = add_lanes(sums.square);
}

template <typename M>
void drift_block(const Pair& pair, int64_t offset, int64_t count, double* to) {
  if (pair.local_type == Dtype::kFloat64) return drift_block<double, M>(pair, offset, count, to);
  drift_block<float, M>(pair, offset, count, to);
}

// `count` elements from `offset`.
template <typename X, typename T>
void land_run(T factor, const Landing& landing, int64_t offset, int64_t count) {
  const T* const local = static_cast<T*>(landing.local) + offset;
  const T* const mean = static_cast<T*>(landing.mean) + offset;
  if (landing.x_type == kDtype<X>) {
    X* const x = static_cast<X*>(landing.x) + offset;
#pragma omp simd
    for (int64_t e = 0; e < count; ++e) land(factor, x[e], local[e], mean[e]);
    return;
  }
  Block<X> block{};
  for (int64_t at = 0; at < count; at += kBlock) {
    const int64_t left = count - at < kBlock ? count - at : kBlock;
    X* const x = load(landing.x, landing.x_type, offset + at, left, block);
#pragma omp simd
    for (int64_t e = 0; e < left; ++e) land(factor, x[e], local[at + e], mean[at + e]);
    store(x, landing.x, landing.x_type, offset + at, left);
  }
}

struct ColumnWeights {
  uint32_t of[kColumns];

  constexpr ColumnWeights() : of() {
    for (int64_t k = 0; k < kColumns; ++k) of[k] = column_weight(k);
  }
};

constexpr ColumnWeights kColumnWeights;

// The first words of a block, each by its weight. They need not be aligned.
uint64_t sum_weighted_words(const char* from, int64_t count, uint32_t flipped) {
  uint64_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < count; ++k) {
    uint32_t word;
    memcpy(&word, from + 4 * k, 4);
    sum += apply_weight(word, kColumnWeights.of[k] ^ flipped);
  }
  return sum;
}

}  // namespace

uint64_t fingerprint_blocks(const FingerprintTask& task, int64_t begin, int64_t end) {
  int64_t index = find_slot(task.spans, task.count, begin);
  uint64_t total = 0;
  for (int64_t block = begin; block < end; ++block) {
    while (index + 1 < task.count && task.spans[index + 1].first_block <= block) ++index;
    const Span& span = task.spans[index];
    const int64_t offset = (block - span.first_block) * kBlockBytes, left = span.bytes - offset;
    const char* const from = static_cast<const char*>(span.data) + offset;
    const BlockWeight weight = block_weight(block);
    const int64_t words = left < kBlockBytes ? left / 4 : kColumns;
    uint64_t sum = sum_weighted_words(from, words, weight.flipped);
    if (words < kColumns && left % 4) {
      uint32_t last = 0;
      memcpy(&last, from + 4 * words, left % 4);
      sum += apply_weight(last, kColumnWeights.of[words] ^ weight.flipped);
    }
    total += sum * weight.factor;
  }
  return total;
}

void land_blocks(const LandTask& task, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  int64_t index = find_slot(task.landings, task.count, begin);
  for (int64_t block = begin; block < end; ++index) {
    const Landing& landing = task.landings[index];
    const int64_t offset = (block - landing.first_block) * kBlock, available = (end - block) * kBlock;
    const int64_t left = landing.numel - offset, count = left < available ? left : available;
    if (landing.mean_type == Dtype::kFloat32) {
      land_run<float>(float(task.factor), landing, offset, count);
    } else if (landing.x_type == Dtype::kFloat64) {
      land_run<double>(task.factor, landing, offset, count);
    } else {
      land_run<float>(task.factor, landing, offset, count);
    }
    block += (count + kBlock - 1) / kBlock;
  }
}

void drift_blocks(const DriftTask& task, int64_t begin, int64_t end, double* sums) {
  const FlushSubnormals flush;
  int64_t index = find_slot(task.pairs, task.pair_count, begin);
  for (int64_t block = begin; block < end; ++block, sums += kSums) {
    while (index + 1 < task.pair_count && task.pairs[index + 1].first_block <= block) ++index;
    const Pair& pair = task.pairs[index];
    const int64_t offset = (block - pair.first_block) * kDriftBlock, left = pair.numel - offset;
    const int64_t count = left < kDriftBlock ? left : kDriftBlock;
    if (pair.mean_type == Dtype::kFloat64) {
      drift_block<double>(pair, offset, count, sums);
    } else {
      drift_block<float>(pair, offset, count, sums);
    }
  }
}

}  // namespace deslo::DESLO_ISA
