// A step on a CUDA device as plain data: what the host side, which knows torch, gives to step_cuda.cu, which does not.
#pragma once

#include <cstdint>

#include "../math/row.h"
#include "../math/scale.h"
#include "../cpu/kernels.h"

namespace texp::cuda {

// Elements and threads of a block.
constexpr int64_t kTile = 4096;
constexpr int kThreads = 256;

enum class Kind : uint8_t {
  fixed,      // the row is given
  stepping,   // the row is that of a tensor with a gradient in a group whose scale is on the device
  idle,       // or without one
  statistic,  // multiplied by the growth of that scale, to a power
};

// One tensor, dense, p, g and b in the same order of elements, in device memory.
struct Tensor {
  void* p;  // modified in place
  union {
    const void* g;  // null: none
    double power;   // of a statistic
  };
  void* b;  // modified in place; null: none
  int64_t numel;
  int32_t slot;     // of stepping and idle ones: the place in Device::started
  uint16_t source;  // of its row: an index into the rows, or into the groups
  Kind kind;
  uint8_t bits;  // Dtype of p (bits 0 and 1), of b (2 and 3) and of g (6 and 7), and flags

  static constexpr uint8_t kBuffered = 16;  // it has a buffer, which is empty if b is null
  static constexpr uint8_t kFresh = 32;     // one that has only just been made

  static constexpr uint8_t bits_of(Dtype p, Dtype g, Dtype b) {
    return static_cast<uint8_t>(static_cast<int>(p) | static_cast<int>(b) << 2 | static_cast<int>(g) << 6);
  }

  TEXP_INLINE Dtype dtype() const { return static_cast<Dtype>(bits & 3); }
  TEXP_INLINE Dtype g_dtype() const { return static_cast<Dtype>(bits >> 6); }
  TEXP_INLINE Dtype b_dtype() const { return static_cast<Dtype>(bits >> 2 & 3); }
};

// A hyperparameter: given, or read from device memory when the step runs.
struct Number {
  enum class In : uint8_t { host, float32, float64 };
  union {
    double value;
    const void* at;
  };
};

// P and κ of a group, and whether any tensor of it has taken its first step with momentum, in device memory.
struct State {
  double P, kappa;
  int64_t exponent, started;
};

// A group whose scale is on the device.
struct Group {
  Number lr, momentum, dampening, weight_decay;
  State* state;        // advanced when the step has been taken
  Number::In in[4];    // where the numbers are
  bool nesterov, maximize, scale_invariant;
  bool unbuffered;  // no tensor of it had a buffer when the step was launched
  bool ends;        // this launch holds the last of its tensors
};

// What steps with a scale on the device have in common. All in device memory.
struct Device {
  const float* grad_scale;   // what the loss was multiplied by; null: 1
  const float* found_inf;    // not 0: nothing is changed; null: as 0
  uint8_t* started;          // by slot: whether the tensor has taken its first step with momentum
  uint32_t* ticket;          // 0 between steps
};

}  // namespace texp::cuda

extern "C" {

// Launches a step of all tensors on a stream, in as few launches as hold their tables (32 KB each); a group's tensors
// stand in a row. `groups` and `device` are null if all tensors are of Kind::fixed, otherwise `rows` is. Returns null,
// or what CUDA says went wrong; then no launch, or not all of them, took place.
const char* texp_cuda_step(int device_index, void* stream, const texp::cuda::Tensor* tensors, int64_t n,
                           const texp::Row<double>* rows, const texp::cuda::Group* groups,
                           const texp::cuda::Device* device);

// Loads the kernels that take groups and device, which are otherwise loaded by their first launch: not in a capture.
// Returns null, or what CUDA says went wrong.
const char* texp_cuda_load(int device_index);

// Whether what is launched on the stream is being captured in a graph.
bool texp_cuda_is_capturing(void* stream);

// How many devices there are, or −1, and then `error` says why there is none.
int texp_cuda_devices(const char** error);
}
