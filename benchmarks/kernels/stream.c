// The memory traffic of a step and nothing else: one tensor read, `count` tensors read and written, in one pass.
#define LOOP(...)                      \
  for (long i = begin; i < end; ++i) { \
    const float a = g[i] * 1e-6f;      \
    __VA_ARGS__                        \
  }

void stream(const float* g, float** m, int count, long begin, long end) {
  float *x = m[0], *v = m[1], *u1 = m[2], *u2 = m[count > 3 ? 3 : 2], *u3 = m[count > 4 ? 4 : 2];
  switch (count) {
    case 3:
#pragma omp simd
      LOOP(x[i] += a; v[i] += a; u1[i] += a;)
      break;
    case 4:
#pragma omp simd
      LOOP(x[i] += a; v[i] += a; u1[i] += a; u2[i] += a;)
      break;
    case 5:
#pragma omp simd
      LOOP(x[i] += a; v[i] += a; u1[i] += a; u2[i] += a; u3[i] += a;)
      break;
  }
}

// The memory traffic of any kernel: `count` tensors of which a step moves bytes[k], reads them, writes them, or both
// (kinds[k] = 1, 2, 3). Bytes are multiples of 4; steps begin..end.
void traffic(char** tensors, const long* bytes, const int* kinds, int count, long begin, long end) {
  for (long i = begin; i < end; ++i) {
    unsigned sum = 1;
    for (int k = 0; k < count; ++k) {
      unsigned* const words = (unsigned*)(tensors[k] + i * bytes[k]);
      const long length = bytes[k] / 4;
      if (kinds[k] == 1) {
#pragma omp simd reduction(^ : sum)
        for (long w = 0; w < length; ++w) sum ^= words[w];
      } else if (kinds[k] == 2) {
#pragma omp simd
        for (long w = 0; w < length; ++w) words[w] = sum;
      } else {
#pragma omp simd
        for (long w = 0; w < length; ++w) words[w] ^= sum;
      }
    }
  }
}
