// The local update rules in the papers' letters, element by element: all arithmetic of the CPU and of the CUDA kernels.
//
//   x parameter   g gradient   u first momenta   v second momentum   t updates made before this one: 0, 1, 2, ...
//
//     u_j <- beta_j u_j + (1 - beta_j) z                 z = g, or the normalised gradient of ADOPT
//     d    = (1 - sum_j w_j) z + sum_j w_j u_j           MT-DAO, arXiv 2510.05361, Alg. 1; DES-LOC is N = 1, w = 1
//
// deslo_plugin/algorithm/rules.py is the same in Python and says where text and code of the papers differ.
// Sums, products, quotients and square roots are rounded one by one (no contraction to fused multiply-add, see
// setup.py), so every instruction set and the GPU give the same bits.
#pragma once

#include <math.h>

#include "numbers.h"

namespace deslo {

enum class Rule : uint8_t { kSgdm, kAdam, kAdopt, kAdoptStart };

// The user's settings, in double.
struct Hyperparameters {
  Rule rule;
  bool bias_correction;
  int momenta;
  int64_t t;
  double lr, weight_decay, beta2, eps, clip_value;  // clip_value 0: no clipping
  double beta[kMaxMomenta], weight[kMaxMomenta];
};

// The constants of the arithmetic, rounded once from double. beta* and one_minus_* are formed in double: 1 - 0.9999 in
// float is wrong in the fourth digit.
template <typename T>
struct Constants {
  int momenta;
  T decay, step, eps, limit, clip_value;
  T beta2, one_minus_beta2;
  T rest;
  T beta[kMaxMomenta], one_minus_beta[kMaxMomenta], weight[kMaxMomenta];
};

template <typename T>
DESLO_INLINE Constants<T> make_constants(const Hyperparameters& h) {
  const bool correct = h.rule == Rule::kAdam && h.bias_correction;
  // sqrt(1 - beta2^(t+1)) multiplies eps and the step instead of dividing every sqrt(v)
  const double root = correct ? sqrt(1 - pow(h.beta2, double(h.t + 1))) : 1.0;
  Constants<T> c{};
  c.momenta = h.momenta;
  c.decay = T(1 - h.lr * h.weight_decay);
  c.step = T(h.lr * root);
  c.eps = T(h.eps * root);
  c.limit = T(pow(double(h.t), 0.25));
  c.clip_value = T(h.clip_value);
  c.beta2 = T(h.beta2);
  c.one_minus_beta2 = T(1 - h.beta2);
  double rest = 1;
  for (int j = 0; j < h.momenta; ++j) {
    const double correction = correct ? 1 - pow(h.beta[j], double(h.t + 1)) : 1.0;
    c.beta[j] = T(h.beta[j]);
    c.one_minus_beta[j] = T(1 - h.beta[j]);
    c.weight[j] = T(h.weight[j] / correction);
    rest -= h.weight[j];
  }
  c.rest = T(fabs(rest) > 1e-12 ? rest : 0.0);
  return c;
}

// All constants of a call with states of type S. Rounding takes no space where states are not rounded at random.
template <typename S>
struct Coefficients : Constants<Arithmetic<S>>, Rounding<S> {};

template <typename S>
DESLO_INLINE Coefficients<S> make_coefficients(const Hyperparameters& h) {
  Coefficients<S> r{};
  static_cast<Constants<Arithmetic<S>>&>(r) = make_constants<Arithmetic<S>>(h);
  if constexpr (kDtype<S> == Dtype::kBFloat16) {
    for (int state = 0; state <= h.momenta; ++state) r.keys[state] = Rounding<S>::make_key(h.t, state);
  }
  return r;
}

DESLO_INLINE float square_root(float a) { return sqrtf(a); }
DESLO_INLINE double square_root(double a) { return sqrt(a); }

// a within [low, high]; NaN stays NaN, which fmin and fmax would drop.
template <typename T>
DESLO_INLINE T clamp(T a, T low, T high) {
  a = a < low ? low : a;
  return a > high ? high : a;
}

// g within [-rho, rho], the clipping of the papers' theory; infinities become NaN, not rho.
template <typename T>
DESLO_INLINE T clip(T g, T rho) {
  return clamp(g, -rho, rho) + g * T(0);
}

// A rule has two functions: normalize_gradient computes z from g for the momenta, and apply moves x along d. v points
// to the second momentum; sgdm, which has none, never reads it.

// SGD with momenta in exponential-average form: DES-LOC-SGDM (arXiv 2505.22549, Alg. 4), MT-DAO-SGDM.
struct Sgdm {
  static constexpr bool kSecondMoment = false;

  template <typename T>
  static DESLO_INLINE T normalize_gradient(const Constants<T>&, T g, const T*) {
    return g;
  }

  template <typename T>
  static DESLO_INLINE void apply(const Constants<T>& c, T& x, T d, T, T*) {
    x = c.decay * x - c.step * d;
  }
};

// Adam: u and v first, then x <- x - lr d / (sqrt(v) + eps) (arXiv 2505.22549, Alg. 2; arXiv 2510.05361, Alg. 1).
struct Adam {
  static constexpr bool kSecondMoment = true;

  template <typename T>
  static DESLO_INLINE T normalize_gradient(const Constants<T>&, T g, const T*) {
    return g;
  }

  template <typename T>
  static DESLO_INLINE void apply(const Constants<T>& c, T& x, T d, T g, T* v) {
    *v = c.beta2 * *v + c.one_minus_beta2 * (g * g);
    x = c.decay * x - c.step * (d / (square_root(*v) + c.eps));
  }
};

// ADOPT: z = clamp(g / max(sqrt(v), eps), -t^(1/4), +t^(1/4)) with the OLD v; v last (arXiv 2505.22549, Alg. 3).
struct Adopt {
  static constexpr bool kSecondMoment = true;

  template <typename T>
  static DESLO_INLINE T normalize_gradient(const Constants<T>& c, T g, const T* v) {
    const T r = square_root(*v);
    return clamp(g / (r < c.eps ? c.eps : r), -c.limit, c.limit);
  }

  template <typename T>
  static DESLO_INLINE void apply(const Constants<T>& c, T& x, T d, T g, T* v) {
    x = c.decay * x - c.step * d;
    *v = c.beta2 * *v + c.one_minus_beta2 * (g * g);
  }
};

// The first step of ADOPT, t = 0, only sets v = g^2: no parameter moves, and the caller passes no momenta.
struct AdoptStart {
  static constexpr bool kSecondMoment = true;

  template <typename T>
  static DESLO_INLINE T normalize_gradient(const Constants<T>&, T, const T*) {
    return T(0);
  }

  template <typename T>
  static DESLO_INLINE void apply(const Constants<T>&, T&, T, T g, T* v) {
    *v = g * g;
  }
};

// Updates one momentum u_j towards z, and adds w_j u_j to d.
template <typename T>
DESLO_INLINE void update_momentum(const Constants<T>& c, int j, T z, T& u, T& d) {
  u = c.beta[j] * u + c.one_minus_beta[j] * z;
  d = d + c.weight[j] * u;
}

// Unscaling (or a norm-clip factor) and value clipping.
template <typename T>
DESLO_INLINE T prepare_gradient(const Constants<T>& c, T scale, T g) {
  const T scaled = g * scale;
  return c.clip_value > T(0) ? clip(scaled, c.clip_value) : scaled;
}

}  // namespace deslo
