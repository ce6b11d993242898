// P and κ of a group advanced by one step, and the rows that result: the formulas of texp/theory.py `advance`, in
// float64 and in the same order of operations, so that both give the same bits. Shared by CPU and CUDA code.
#pragma once

#include <cmath>
#include <cstdint>

#include "row.h"

namespace texp {

// A step hands at most half of the weights over to the scale.
constexpr double kAlphaMin = 0.5;

// The stored weight is p = Pθ, the stored buffer b = (v − κθ)/P, where θ and v are those of torch.optim.SGD. The
// paper's P is P·2^exponent.
struct Scale {
  double P = 1;
  int64_t exponent = 0;
  double kappa = 0;

  bool operator==(const Scale&) const = default;
};

// The arguments of LARS: how the trust ratio of a tensor is made of its norms.
struct Trust {
  double coeff = 0, eps = 0;
  bool is_used = false, clips = false, always_adapts = false;
  uint8_t unused[5] = {};

  bool operator==(const Trust&) const = default;
};

struct Hyperparameters {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize, scale_invariant;
  Trust trust = {};

  bool operator==(const Hyperparameters&) const = default;
};

struct Step {
  Row<double> running;  // of a tensor that has a buffer
  Row<double> first;    // of a tensor's first step
  Row<double> idle;     // of a tensor without a gradient, while its group steps
  Scale scale;          // after the step
  double growth;        // P after over P before, as stored: what norm statistics scale with, to a power
};

struct Limits {
  double kappa, mu;
};

// The most of κ and of μ that one step hands over to the scale: their values at the end of the theorem's range.
TEXP_INLINE Limits limits(const Hyperparameters& h) {
  if (!h.scale_invariant || h.momentum >= 1 || h.lr < 0) return {0, 0};
  if (h.lr == 0) return {HUGE_VAL, HUGE_VAL};
  double kappa = 1, mu = 1;
  if (h.momentum != 0) {
    if (h.nesterov) {
      kappa = 2 * (1 - h.momentum) / ((1 + h.momentum) * (1 + h.momentum));
      mu = (1 - h.momentum) / (1 + h.momentum);
    } else {
      kappa = mu = 1 - std::sqrt(h.momentum);
    }
  }
  constexpr double most = 1 - kAlphaMin;
  return {(kappa < most ? kappa : most) / h.lr, (mu < most ? mu : most) / h.lr};
}

TEXP_INLINE double clipped(double kappa, double limit) {
  const double positive = kappa > 0 ? kappa : 0;
  return positive < limit ? positive : limit;
}

// What a statistic is multiplied by. Powers 1 and 2, those of means and variances behind one layer, are exact products.
TEXP_INLINE double power_of(double growth, double power) {
  return power == 1 ? growth : power == 2 ? growth * growth : std::pow(growth, power);
}

// What gradients of that norm are multiplied by to have one of max_norm at most, as torch.nn.utils.clip_grad_norm_ has
// it; NaN where the norm is not finite.
TEXP_INLINE double clip_factor(double norm, double max_norm) {
  if (!(norm < HUGE_VAL)) return NAN;
  const double factor = max_norm / (norm + 1e-6);
  return factor < 1 ? factor : 1;
}

// What the gradient and the decay of a tensor are multiplied by. g_norm: of the unscaled, clipped gradient.
TEXP_INLINE double trust_ratio(const Hyperparameters& h, double p_norm, double g_norm) {
  const Trust& trust = h.trust;
  if (!trust.is_used || (h.weight_decay == 0 && !trust.always_adapts)) return 1;
  double ratio = 1;
  if (p_norm > 0 && g_norm > 0) ratio = trust.coeff * p_norm / (g_norm + p_norm * h.weight_decay + trust.eps);
  if (trust.clips) {
    ratio = h.lr == 0 ? 1 : ratio / h.lr;
    if (ratio > 1) ratio = 1;
  }
  return ratio;
}

// The row of an ordinary group whose gradient and decay are multiplied by the ratio.
TEXP_INLINE Row<double> with_ratio(Row<double> row, double ratio) {
  row.a_g *= ratio;
  row.a_p *= ratio;
  row.c_g *= ratio;
  row.c_p *= ratio;
  return row;
}

// first: no tensor of the group has a momentum buffer yet. grad_scale: what the loss was multiplied by.
TEXP_INLINE Step advance(const Scale& scale, const Hyperparameters& h, bool first, double grad_scale) {
  const double P2 = scale.P * scale.P;
  // torch.optim.SGD, with ĝ = g + λθ: v ← keep·v + enter·ĝ and θ ← θ − η(direct·ĝ + through·v)
  const bool plain = h.momentum == 0;
  const double keep = plain ? 1 : h.momentum;
  const double enter = plain ? 0 : 1 - h.dampening;
  const double direct = plain || h.nesterov ? 1 : 0;
  const double through = plain ? 0 : h.nesterov ? h.momentum : 1;

  Limits limit = limits(h);
  if (first && h.lr == 0 && !plain) limit.kappa = 0;
  const double kappa_running = keep * scale.kappa + enter * h.weight_decay;
  const double kappa_first = plain ? kappa_running : h.weight_decay;
  const double kappa_c = clipped(first ? kappa_first : kappa_running, limit.kappa);
  const double mu = direct * h.weight_decay + through * kappa_c;
  const double mu_c = clipped(mu, limit.mu);
  const double alpha = 1 - h.lr * mu_c;

  int k;
  const double P_after = 2 * std::frexp(scale.P / alpha, &k);
  k -= 1;
  const double shrink = std::ldexp(1.0, -k);

  Step step;
  step.scale = {P_after, scale.exponent + k, kappa_c / alpha};
  step.growth = shrink / alpha;
  const double sign = (h.maximize ? -1.0 : 1.0) / grad_scale;
  const bool heavy_ball = direct == 0;  // then d = u, and α·u + κc·η·d is u itself
  step.running = {
      .a_b = keep,
      .a_g = enter * sign,
      .a_p = (kappa_running - kappa_c) / P2,
      .c_u = through,
      .c_g = direct * sign,
      .c_p = (mu - mu_c) / P2,
      .s_p = shrink,
      .e = P2 * h.lr / alpha * shrink,
      .r_u = (heavy_ball ? 1 : alpha) / shrink,
      .r_d = (heavy_ball ? 0 : kappa_c * h.lr) / shrink,
  };
  step.first = step.running;
  if (!plain) {
    step.first.a_b = 0;
    step.first.a_g = sign;
    step.first.a_p = (kappa_first - kappa_c) / P2;
  }
  step.idle = {};
  step.idle.a_b = alpha;
  step.idle.a_p = alpha * (scale.kappa - step.scale.kappa) / P2;
  step.idle.s_p = shrink / alpha;
  step.idle.r_u = 1 / shrink;
  return step;
}

}  // namespace texp
