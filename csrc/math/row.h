// One step for one element, as a row of ten scalars. CPU and CUDA code share this file and compute the same bits.
#pragma once

#include <cmath>
#include <initializer_list>

#if defined(__CUDACC__)
#define TEXP_INLINE __host__ __device__ __forceinline__
#else
#define TEXP_INLINE inline __attribute__((always_inline))
#endif

namespace texp {

// With weight p, gradient g and momentum buffer b:
//
//     u = a_b·b + a_g·g + a_p·p
//     d = c_u·u + c_g·g + c_p·p
//     p ← s_p·p − e·d
//     b ← r_u·u + r_d·d
//
// torch.optim.SGD and the exponential form of Li & Arora (ICLR 2020) are both such rows; texp/theory.py says which.
template <class T>
struct Row {
  T a_b, a_g, a_p, c_u, c_g, c_p, s_p, e, r_u, r_d;

  template <class U>
  Row<U> to() const {
    return {U(a_b), U(a_g), U(a_p), U(c_u), U(c_g), U(c_p), U(s_p), U(e), U(r_u), U(r_d)};
  }

  bool operator==(const Row&) const = default;

  bool is_finite() const {
    for (const T x : {a_b, a_g, a_p, c_u, c_g, c_p, s_p, e, r_u, r_d})
      if (!std::isfinite(x)) return false;
    return true;
  }
};

// The row that leaves p and b as they are.
constexpr Row<double> kKeep{.a_b = 1, .s_p = 1, .r_u = 1};

// Fused by name, so that it does not depend on compiler flags.
TEXP_INLINE float fused(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
TEXP_INLINE double fused(double x, double y, double z) { return __builtin_fma(x, y, z); }

// a·x + y, and y itself where a is 0: a term that a row does not have must not make NaN of infinite numbers.
template <class T>
TEXP_INLINE T plus(T a, T x, T y) {
  return a == 0 ? y : fused(a, x, y);
}

// a·x, and −0 where a is 0, which added to anything leaves it as it is.
template <class T>
TEXP_INLINE T times(T a, T x) {
  return a == 0 ? T(-0.0) : a * x;
}

template <class T>
TEXP_INLINE void update(const Row<T>& row, T& p, T g, T& b) {
  // The products that are not fused are those with a scalar that is 1 in ordinary SGD: they are exact.
  const T u = plus(row.a_b, b, plus(row.a_p, p, times(row.a_g, g)));
  const T d = plus(row.c_u, u, plus(row.c_p, p, times(row.c_g, g)));
  p = fused(-row.e, d, row.s_p * p);
  b = plus(row.r_d, d, row.r_u * u);
}

// Heavy ball: d = u, and b only scales.
template <class T>
bool is_heavy_ball(const Row<T>& row) {
  return row.c_u == 1 && row.c_g == 0 && row.c_p == 0 && row.r_d == 0;
}

// As `update` for such a row, with the same bits.
template <class T>
TEXP_INLINE void update_heavy_ball(const Row<T>& row, T& p, T g, T& b) {
  const T u = plus(row.a_b, b, plus(row.a_p, p, times(row.a_g, g)));
  p = fused(-row.e, u, row.s_p * p);
  b = row.r_u * u;
}

}  // namespace texp
