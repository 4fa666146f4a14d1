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
