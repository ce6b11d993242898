// What the kernels of every backend read: the tensors of a step and, where rows are computed on a device, what they are
// made from. It is laid out here and nowhere else; kernels/layout.py names the same words for Triton, and a test compares
// them with sizeof and offsetof.
#pragma once

#include <cstdint>

#include "math/scale.h"

namespace texp {

enum class Dtype : uint8_t { float32, float64, bfloat16, float16 };

// Those of p, g and b. Where there is no g or no b, it counts as having that of p, so that there are fewer mixes.
struct Dtypes {
  uint8_t bits;  // p in bits 0 and 1, g in 2 and 3, b in 4 and 5

  static constexpr Dtypes of(Dtype p, Dtype g, Dtype b) {
    return {static_cast<uint8_t>(static_cast<int>(p) | static_cast<int>(g) << 2 | static_cast<int>(b) << 4)};
  }

  TEXP_INLINE Dtype p() const { return static_cast<Dtype>(bits & 3); }
  TEXP_INLINE Dtype g() const { return static_cast<Dtype>(bits >> 2 & 3); }
  TEXP_INLINE Dtype b() const { return static_cast<Dtype>(bits >> 4 & 3); }

  // Whether the arithmetic is in float64: it is where p, g or b is, and otherwise in float32. Each element is converted
  // to that, and p and b are rounded once to their own dtypes: from float64 to bf16 and fp16 by way of float32, as torch
  // does.
  TEXP_INLINE bool is_wide() const {
    return p() == Dtype::float64 || g() == Dtype::float64 || b() == Dtype::float64;
  }

  // Whether the kernels have a loop for just these. Elements of other mixes are converted to the type of the arithmetic
  // first.
  TEXP_INLINE bool is_usual() const {
    return g() == p() && (b() == p() || (b() == Dtype::float32 && p() != Dtype::float64));
  }

  bool operator==(const Dtypes&) const = default;
};

// One tensor of a step, dense, p, g and b in the same order of elements.
struct TensorEntry {
  void* p;        // modified in place
  const void* g;  // read; null: 0
  void* b;        // modified in place; null: 0, not written
  int64_t numel;
  int32_t row;  // index into the rows of the step
  Dtypes dtypes;
  uint8_t unused[3];
};

// The rest is for steps whose rows are computed on a device, by `advance`: one row for each tensor.

// Which row.
enum class RowKind : uint8_t {
  step,       // of a tensor with a gradient: its first step, or a later one
  idle,       // of a tensor without one, while its group steps
  statistic,  // of a running statistic: the growth of P to a power
};

// What the row of a tensor is made from.
struct RowRequest {
  double power;   // of a statistic
  int32_t group;  // index into the groups
  int32_t slot;   // its place in momentum_initialized
  RowKind kind;
  bool has_buffer;       // which counts as not there as long as momentum_initialized says so
  bool newly_allocated;  // the buffer, for this step: it is the tensor's first, whatever momentum_initialized says
  uint8_t unused[5];
};

// A hyperparameter: given, or read from device memory when the step runs.
struct Number {
  enum class In : uint8_t { host, float32, float64 };
  union {
    double value;
    const void* at;
  };
};

// P and κ of a group, in device memory.
struct DeviceScale {
  double P, kappa;
  int64_t exponent;
  int64_t momentum_initialized;  // whether any tensor of the group has taken its first step with momentum
};

struct GroupEntry {
  Number lr, momentum, dampening, weight_decay;
  DeviceScale* scale;      // advanced in place
  int32_t begin, end;      // its tensors
  Number::In in[4];        // where the numbers are
  bool nesterov, maximize, scale_invariant;
  bool without_buffers;  // no tensor of it had one when the step was launched: it is the group's first
  Trust trust;
};

// What `reduce` makes of each tensor.
enum class Reduction : uint8_t {
  squares,         // ‖p‖² and ‖g‖²
  grad_squares,    // ‖g‖², without reading p
  grad_max,        // max |g|, likewise; NaN where an element is NaN
};

// What `advance` reads and writes besides, all in device memory.
struct DeviceStep {
  const float* grad_scale;        // what the loss was multiplied by; null: 1
  const float* found_inf;         // not 0: nothing is changed; null: as 0
  const double* norm;             // of all gradients, which are multiplied by clip_factor; null: they are not
  double max_norm;
  bool skips_nonfinite;           // nothing is changed either where the norm is not finite
  uint8_t* momentum_initialized;  // by slot: whether the tensor has taken its first step with momentum
  Row<double>* rows;              // written, one for each tensor
  int32_t* skip;                  // written: 1 where `apply` is to change nothing, else 0
  const double* sums;             // ‖p‖² and ‖g‖² of each tensor, if any group has a Trust
};

static_assert(sizeof(TensorEntry) == 40 && sizeof(RowRequest) == 24 && sizeof(DeviceScale) == 32 && sizeof(GroupEntry) == 80);

}  // namespace texp
