// A step on a CUDA device: every tensor of every group, of any mix of dtypes, in one launch, one block for each tile.
//
// The tables of a launch (tensors, rows or groups) travel by value as its argument, so that nothing has to be uploaded,
// kept alive or looked up by address. Where the scales are on the device, every block computes its row from them, and
// the last one to have done so advances them: a captured graph replays the schedule without the host.
//
// Bytes: p, g and b are read and p and b written once, 20 bytes for each float32 element; that over the bandwidth of the
// card is the floor.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "../math/tiles.h"

namespace texp::cuda {
namespace {

// Arguments of a kernel are at most 32,764 bytes; a launch copies all of them, so small steps have a small table.
constexpr int kSmall = 4096 - 64, kMost = 32764 - 64;

// Rows or groups, then tensors, then the number of tiles before each tensor and of all.
template <int kBytes>
struct alignas(8) Table {
  Device device;
  int32_t tensors, tensors_at, first_at;
  alignas(8) unsigned char bytes[kBytes];

  template <class T>
  __device__ const T* at(int offset) const {
    return reinterpret_cast<const T*>(bytes + offset);
  }
};

__device__ float widened(float x) { return x; }
__device__ double widened(double x) { return x; }
__device__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widened(__half x) { return __half2float(x); }

__device__ void narrow(float x, float& to) { to = x; }
__device__ void narrow(double x, double& to) { to = x; }
__device__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ void narrow(double x, float& to) { to = static_cast<float>(x); }
__device__ void narrow(double x, __nv_bfloat16& to) { to = __float2bfloat16_rn(static_cast<float>(x)); }
__device__ void narrow(double x, __half& to) { to = __float2half_rn(static_cast<float>(x)); }

// Elements that one thread reads and writes at once: 16 bytes of float32. Of other dtypes fewer bytes, for want of
// registers: more of these would cost more threads, and so more bytes under way, than wider loads would bring.
template <class P>
constexpr int kCount = sizeof(P) == 8 ? 1 : 4;

template <class E, int kElements>
struct alignas(sizeof(E) * kElements) Vector {
  E e[kElements];
};

template <int kBytes>
struct Word;
template <>
struct Word<16> {
  using Type = uint4;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<2> {
  using Type = uint16_t;
};

// p is what the next forward pass reads; g and b are not read again soon, and make room in the cache first.
template <class V>
__device__ V load(const void* from, bool soon) {
  using W = typename Word<sizeof(V)>::Type;
  const W* at = static_cast<const W*>(from);
  const W bits = soon ? *at : __ldcs(at);
  V v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

template <class V>
__device__ void store(void* to, const V& v, bool soon) {
  using W = typename Word<sizeof(V)>::Type;
  W bits;
  memcpy(&bits, &v, sizeof v);
  W* at = static_cast<W*>(to);
  soon ? void(*at = bits) : __stcs(at, bits);
}

template <class V>
__device__ bool aligned(const void* p) {
  return (reinterpret_cast<uintptr_t>(p) & (sizeof(V) - 1)) == 0;
}

// Tells the compiler that a pointer from a table is one to global memory.
template <class E>
__device__ E* global(E* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

template <class T, class P, class B>
__device__ void update_tile(const Row<T>& row, const Tensor& t, void* buf, const void* grad, int64_t offset, int n) {
  constexpr int kCount = cuda::kCount<P>;
  using Ps = Vector<P, kCount>;
  using Bs = Vector<B, kCount>;
  P* p = global(static_cast<P*>(t.p)) + offset;
  const P* g = grad == nullptr ? nullptr : global(static_cast<const P*>(grad)) + offset;
  B* b = buf == nullptr ? nullptr : global(static_cast<B*>(buf)) + offset;

  const int whole = aligned<Ps>(p) && aligned<Ps>(g) && aligned<Bs>(b) ? n / kCount * kCount : 0;
#pragma unroll 1
  for (int i = threadIdx.x * kCount; i < whole; i += kThreads * kCount) {
    Ps ps = load<Ps>(p + i, true), gs{};
    Bs bs{};
    if (g != nullptr) gs = load<Ps>(g + i, false);
    if (b != nullptr) bs = load<Bs>(b + i, false);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      T weight = widened(ps.e[k]), buffer = widened(bs.e[k]);
      update<T>(row, weight, widened(gs.e[k]), buffer);
      narrow(weight, ps.e[k]);
      narrow(buffer, bs.e[k]);
    }
    store(p + i, ps, true);
    if (b != nullptr) store(b + i, bs, false);
  }
#pragma unroll 1
  for (int i = whole + threadIdx.x; i < n; i += kThreads) {
    T weight = widened(p[i]), buffer = b == nullptr ? T(0) : widened(b[i]);
    update<T>(row, weight, g == nullptr ? T(0) : widened(g[i]), buffer);
    narrow(weight, p[i]);
    if (b != nullptr) narrow(buffer, b[i]);
  }
}

__device__ int size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// kCount elements of one tensor, of a dtype that is known when the kernel runs: as they lie in memory, and as T.
template <class T, int kCount>
struct Mixed {
  char* at;  // null: none
  Dtype dtype;

  struct Bits {  // of which narrower elements fill the first words
    uint32_t words[kCount * sizeof(T) / 4];
  };

  __device__ Mixed(const void* tensor, Dtype dtype, int64_t offset)
      : at(tensor == nullptr ? nullptr : static_cast<char*>(const_cast<void*>(tensor)) + offset * size_of(dtype)),
        dtype(dtype) {}

  __device__ bool is_aligned() const {
    return (reinterpret_cast<uintptr_t>(at) & (kCount * size_of(dtype) - 1)) == 0;
  }

  // All that is loaded is asked for before any of it is converted, and only the number of bytes matters yet.
  __device__ Bits load(int i, bool soon) const {
    Bits bits;
    const int size = size_of(dtype);
    const char* from = at + i * size;
    if (at == nullptr) {
      bits = {};
    } else if (size == 2) {
      copy<2>(bits, from, soon);
    } else if (sizeof(T) == 4 || size == 4) {
      copy<4>(bits, from, soon);
    } else {
      copy<8>(bits, from, soon);
    }
    return bits;
  }

  __device__ void widen(const Bits& bits, T (&to)[kCount]) const {
    switch (dtype) {
      case Dtype::float32:
        return widen<float>(bits, to);
      case Dtype::float64:
        return widen<double>(bits, to);
      case Dtype::bfloat16:
        return widen<__nv_bfloat16>(bits, to);
      case Dtype::float16:
        return widen<__half>(bits, to);
    }
  }

  __device__ void store(int i, const T (&from)[kCount], bool soon) const {
    switch (dtype) {
      case Dtype::float32:
        return store<float>(i, from, soon);
      case Dtype::float64:
        return store<double>(i, from, soon);
      case Dtype::bfloat16:
        return store<__nv_bfloat16>(i, from, soon);
      case Dtype::float16:
        return store<__half>(i, from, soon);
    }
  }

 private:
  template <int kBytes>
  __device__ static void copy(Bits& bits, const char* from, bool soon) {
    if constexpr (kBytes <= sizeof(T)) {
      using W = typename Word<kBytes * kCount>::Type;
      const W* word = global(reinterpret_cast<const W*>(from));
      const W loaded = soon ? *word : __ldcs(word);
      memcpy(&bits, &loaded, sizeof loaded);
    }
  }

  template <class E>
  __device__ static void widen(const Bits& bits, T (&to)[kCount]) {
    if constexpr (sizeof(E) <= sizeof(T)) {
      E e[kCount];
      memcpy(&e, &bits, sizeof e);
#pragma unroll
      for (int k = 0; k < kCount; ++k) to[k] = widened(e[k]);
    }
  }

  template <class E>
  __device__ void store(int i, const T (&from)[kCount], bool soon) const {
    if constexpr (sizeof(E) <= sizeof(T)) {
      Vector<E, kCount> v;
#pragma unroll
      for (int k = 0; k < kCount; ++k) narrow(from[k], v.e[k]);
      cuda::store(global(at + i * sizeof(E)), v, soon);
    }
  }
};

// Any mix of dtypes by way of T: which they are is the same for all of a block.
template <class T, int kCount>
__device__ void update_mixed(const Row<T>& row, const Mixed<T, kCount>& p, const Mixed<T, kCount>& g,
                             const Mixed<T, kCount>& b, int begin, int end) {
#pragma unroll 1
  for (int i = begin + threadIdx.x * kCount; i < end; i += kThreads * kCount) {
    const auto p_bits = p.load(i, true), g_bits = g.load(i, false), b_bits = b.load(i, false);
    T weights[kCount], gradients[kCount], buffers[kCount];
    p.widen(p_bits, weights);
    g.widen(g_bits, gradients);
    b.widen(b_bits, buffers);
#pragma unroll
    for (int k = 0; k < kCount; ++k) update<T>(row, weights[k], gradients[k], buffers[k]);
    p.store(i, weights, true);
    if (b.at != nullptr) b.store(i, buffers, false);
  }
}

template <class T>
__device__ void update_mixed_tile(const Row<T>& row, const Tensor& t, void* buf, const void* grad, int64_t offset,
                                  int n) {
  constexpr int kCount = cuda::kCount<T>;
  using One = Mixed<T, 1>;
  const One p(t.p, t.dtype(), offset), g(grad, t.g_dtype(), offset), b(buf, t.b_dtype(), offset);
  int whole = 0;
  if constexpr (kCount > 1) {
    using Some = Mixed<T, kCount>;
    const Some ps(p.at, p.dtype, 0), gs(g.at, g.dtype, 0), bs(b.at, b.dtype, 0);
    if (ps.is_aligned() && gs.is_aligned() && bs.is_aligned()) whole = n / kCount * kCount;
    update_mixed(row, ps, gs, bs, 0, whole);
  }
  update_mixed(row, p, g, b, whole, n);
}

__device__ double read(const Number& number, Number::In in) {
  switch (in) {
    case Number::In::float32:
      return *global(static_cast<const float*>(number.at));
    case Number::In::float64:
      return *global(static_cast<const double*>(number.at));
    default:
      return number.value;
  }
}

__device__ bool has_momentum(const Group& group) { return read(group.momentum, group.in[1]) != 0; }

__device__ Step step_of(const Group& group, const float* grad_scale) {
  const State& s = *global(group.state);
  const Hyperparameters h{read(group.lr, group.in[0]),        read(group.momentum, group.in[1]),
                          read(group.dampening, group.in[2]), read(group.weight_decay, group.in[3]),
                          group.nesterov,                     group.maximize,
                          group.scale_invariant};
  const double unscaled = grad_scale == nullptr ? 1.0 : *global(grad_scale);
  return advance({s.P, s.exponent, s.kappa}, h, group.unbuffered || s.started == 0, unscaled);
}

// What a block works with.
struct Shared {
  Row<double> wide;
  Row<float> narrow;
  bool without_buffer;  // the tensor has none yet, although there is memory for it
  bool last;            // all blocks have read the scales
};

__device__ void find_row(Shared& shared, const Group& group, const Tensor& t, const Device& device) {
  const Step step = step_of(group, device.grad_scale);
  if (t.kind == Kind::statistic) {
    shared.wide = {};
    shared.wide.s_p = power_of(step.growth, t.power);
    return;
  }
  const bool started = !(t.bits & Tensor::kBuffered) || (!(t.bits & Tensor::kFresh) && *global(device.started + t.slot) != 0);
  shared.wide = t.kind == Kind::idle ? step.idle : started ? step.running : step.first;
  shared.without_buffer = t.kind == Kind::idle && !started;
}

__device__ void update_usual_tile(const Shared& shared, const Tensor& t, void* b, const void* g, int64_t offset,
                                  int n) {
  const bool own = t.dtype() == t.b_dtype();
  switch (t.dtype()) {
    case Dtype::float32:
      return update_tile<float, float, float>(shared.narrow, t, b, g, offset, n);
    case Dtype::float64:
      return update_tile<double, double, double>(shared.wide, t, b, g, offset, n);
    case Dtype::bfloat16:
      return own ? update_tile<float, __nv_bfloat16, __nv_bfloat16>(shared.narrow, t, b, g, offset, n)
                 : update_tile<float, __nv_bfloat16, float>(shared.narrow, t, b, g, offset, n);
    case Dtype::float16:
      return own ? update_tile<float, __half, __half>(shared.narrow, t, b, g, offset, n)
                 : update_tile<float, __half, float>(shared.narrow, t, b, g, offset, n);
  }
}

// Blocks on a multiprocessor that registers must allow for: 40 of them a thread, or 64, which it takes to compute a row
// in float64; for mixed dtypes one block less, with 48 or 80. Each has more than enough bytes under way for the memory
// of the largest cards.
template <bool kOnDevice, bool kMixed>
constexpr int kBlocks = (kOnDevice ? 4 : 6) - kMixed;

// kMixed: for any dtypes, and launched where those of some tensor are others than `is_usual` says. A kernel of its own,
// so that the usual one carries neither its instructions nor its registers.
template <bool kOnDevice, bool kMixed, int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocks<kOnDevice, kMixed>)
    step_kernel(const __grid_constant__ Table<kBytes> table) {
  const Device& device = table.device;
  if (kOnDevice && device.found_inf != nullptr && *global(device.found_inf) != 0) return;
  __shared__ Shared shared;
  const int32_t* first = table.template at<int32_t>(table.first_at);
  const bool has_tile = static_cast<int32_t>(blockIdx.x) < first[table.tensors];  // a launch has a block in any case
  const int32_t index = has_tile ? tensor_of<int32_t>(blockIdx.x, first, table.tensors) : 0;
  const Tensor& t = table.template at<Tensor>(table.tensors_at)[index];
  if constexpr (kOnDevice) {
    if (threadIdx.x == 0) {
      shared.without_buffer = false;
      if (has_tile) find_row(shared, table.template at<Group>(0)[t.source], t, device);
      __threadfence();
      shared.last = atomicInc(device.ticket, gridDim.x - 1) == gridDim.x - 1;
      if (shared.last) __threadfence();
    }
    __syncthreads();
    if (threadIdx.x < 10)
      (&shared.narrow.a_b)[threadIdx.x] = static_cast<float>((&shared.wide.a_b)[threadIdx.x]);
  } else if (threadIdx.x < 10) {
    const double x = (&table.template at<Row<double>>(0)[t.source].a_b)[threadIdx.x];
    (&shared.wide.a_b)[threadIdx.x] = x;
    (&shared.narrow.a_b)[threadIdx.x] = static_cast<float>(x);
  }
  __syncthreads();

  if (has_tile) {
    const int64_t offset = static_cast<int64_t>(blockIdx.x - first[index]) * kTile;
    const int n = static_cast<int>(t.numel - offset < kTile ? t.numel - offset : kTile);
    const void* g = t.kind == Kind::statistic ? nullptr : t.g;
    void* b = kOnDevice && shared.without_buffer ? nullptr : t.b;
    if constexpr (kMixed) {
      is_wide(t.dtype(), t.g_dtype(), t.b_dtype()) ? update_mixed_tile<double>(shared.wide, t, b, g, offset, n)
                                                   : update_mixed_tile<float>(shared.narrow, t, b, g, offset, n);
    } else {
      update_usual_tile(shared, t, b, g, offset, n);
    }
  }

  if constexpr (kOnDevice) {
    if (!shared.last) return;
    const Group* groups = table.template at<Group>(0);
    const int count = table.tensors_at / static_cast<int>(sizeof(Group));
    for (int i = threadIdx.x; i < count; i += kThreads) {
      if (!groups[i].ends) continue;
      const Step step = step_of(groups[i], device.grad_scale);
      State& state = *global(groups[i].state);
      const bool started = !groups[i].unbuffered && state.started != 0;
      state = {step.scale.P, step.scale.kappa, step.scale.exponent, started || has_momentum(groups[i])};
    }
    const Tensor* tensors = table.template at<Tensor>(table.tensors_at);
    for (int i = threadIdx.x; i < table.tensors; i += kThreads) {
      const Tensor& other = tensors[i];
      if (other.kind == Kind::stepping && (other.bits & Tensor::kBuffered) && has_momentum(groups[other.source]))
        global(device.started)[other.slot] = 1;
    }
  }
}

// The tensors [begin, end) of one launch, as many as its table holds.
struct Extent {
  int64_t begin, end, tiles;
  int sources, bytes;
  bool is_mixed;  // whether one of them has other dtypes than `is_usual` says

  int tensors() const { return static_cast<int>(end - begin); }
};

// Whether tensor i has another row, or group, than the one before it in the same launch.
bool new_source(const Tensor* tensors, int64_t i, int64_t begin) {
  return i == begin || tensors[i].source != tensors[i - 1].source;
}

Extent extent_from(const Tensor* tensors, int64_t begin, int64_t n, int source_size) {
  Extent extent{begin, begin, 0, 0, int{sizeof(int32_t)}, false};
  for (int64_t i = begin; i < n; ++i) {
    const bool is_new = new_source(tensors, i, begin);
    const int bytes = extent.bytes + int{sizeof(Tensor) + sizeof(int32_t)} + is_new * source_size;
    const int64_t tiles = extent.tiles + tiles_of(tensors[i].numel, kTile);
    if (i > begin && (bytes > kMost || tiles >= INT32_MAX)) break;
    const bool is_mixed = extent.is_mixed || !is_usual(tensors[i].dtype(), tensors[i].g_dtype(), tensors[i].b_dtype());
    extent = {begin, i + 1, tiles, extent.sources + is_new, bytes, is_mixed};
  }
  return extent;
}

template <int kBytes, class Source>
cudaError_t launch(cudaStream_t stream, const Tensor* tensors, int64_t n, const Source* sources, const Device& device,
                   const Extent& extent) {
  constexpr bool kOnDevice = std::is_same_v<Source, Group>;
  Table<kBytes> table;
  table.device = device;
  table.tensors = extent.tensors();
  table.tensors_at = extent.sources * int{sizeof(Source)};
  table.first_at = table.tensors_at + table.tensors * int{sizeof(Tensor)};
  auto* source = reinterpret_cast<Source*>(table.bytes) - 1;
  auto* to = reinterpret_cast<Tensor*>(table.bytes + table.tensors_at);
  auto* first = reinterpret_cast<int32_t*>(table.bytes + table.first_at);
  int64_t tiles = 0;
  for (int64_t i = extent.begin; i < extent.end; ++i) {
    if (new_source(tensors, i, extent.begin)) *++source = sources[tensors[i].source];
    if constexpr (kOnDevice) source->ends = i + 1 == n || tensors[i + 1].source != tensors[i].source;
    *to = tensors[i];
    to++->source = static_cast<uint16_t>(source - reinterpret_cast<Source*>(table.bytes));
    *first++ = static_cast<int32_t>(tiles);
    tiles += tiles_of(tensors[i].numel, kTile);
  }
  *first = static_cast<int32_t>(tiles);
  const auto blocks = static_cast<unsigned>(tiles > 0 ? tiles : 1);
  void* arguments[] = {&table};
  const auto kernel = extent.is_mixed ? step_kernel<kOnDevice, true, kBytes> : step_kernel<kOnDevice, false, kBytes>;
  cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), arguments, 0, stream);
  return cudaGetLastError();  // and leaves none for the next launch of somebody else
}

template <class Source>
cudaError_t launch_all(cudaStream_t stream, const Tensor* tensors, int64_t n, const Source* sources,
                       const Device& device) {
  for (int64_t i = 0; i < n;) {
    const Extent extent = extent_from(tensors, i, n, sizeof(Source));
    const cudaError_t error = extent.bytes <= kSmall ? launch<kSmall>(stream, tensors, n, sources, device, extent)
                                                     : launch<kMost>(stream, tensors, n, sources, device, extent);
    if (error != cudaSuccess) return error;
    i = extent.end;
  }
  return cudaSuccess;
}

// Makes a device the current one, for a while.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) : error(cudaGetDevice(&before_)), changed_(error == cudaSuccess && before_ != index) {
    if (changed_) error = cudaSetDevice(index);
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;

 private:
  int before_ = 0;

 public:
  cudaError_t error;  // after before_, which is written while this is initialised

 private:
  bool changed_;
};

}  // namespace
}  // namespace texp::cuda

extern "C" const char* texp_cuda_step(int device_index, void* stream, const texp::cuda::Tensor* tensors, int64_t n,
                                      const texp::Row<double>* rows, const texp::cuda::Group* groups,
                                      const texp::cuda::Device* device) {
  const texp::cuda::CurrentDevice here(device_index);
  cudaError_t error = here.error;
  if (error == cudaSuccess)
    error = groups ? texp::cuda::launch_all(static_cast<cudaStream_t>(stream), tensors, n, groups, *device)
                   : texp::cuda::launch_all(static_cast<cudaStream_t>(stream), tensors, n, rows, {});
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

extern "C" const char* texp_cuda_load(int device_index) {
  using texp::cuda::step_kernel;
  const void* kernels[] = {reinterpret_cast<const void*>(step_kernel<true, false, texp::cuda::kSmall>),
                           reinterpret_cast<const void*>(step_kernel<true, false, texp::cuda::kMost>),
                           reinterpret_cast<const void*>(step_kernel<true, true, texp::cuda::kSmall>),
                           reinterpret_cast<const void*>(step_kernel<true, true, texp::cuda::kMost>)};
  const texp::cuda::CurrentDevice here(device_index);
  cudaError_t error = here.error;
  cudaFuncAttributes attributes;
  for (const void* kernel : kernels)
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

extern "C" bool texp_cuda_is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const bool known = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess;
  cudaGetLastError();
  return !known || status != cudaStreamCaptureStatusNone;
}

extern "C" int texp_cuda_devices(const char** error) {
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);
  *error = result == cudaSuccess ? nullptr : cudaGetErrorString(result);
  return result == cudaSuccess ? count : -1;
}
