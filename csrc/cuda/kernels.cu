// The phases of a step that run on a CUDA device: `reduce` sums squares, `norm` makes of them the norm of all gradients,
// `advance` computes rows, and `apply` applies rows to tensors of any mix of dtypes, in one launch for all tensors of all
// groups.
//
// Tables (tensors, rows, groups) travel by value as the argument of a launch, so nothing has to be uploaded or kept
// alive; what does not fit into one argument takes several launches. In a captured graph `advance` reads and writes the
// state of the schedule on the device, so the schedule goes on without the host.
//
// `apply` is bound by memory: it reads p, g and b and writes p and b once, 20 bytes for each float32 element. Nothing
// here asks the cache to evict anything first: on an H100 such hints cost 3 %.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "../math/scale.h"
#include "../math/tiles.h"

namespace texp::cuda {
namespace {

constexpr int kThreads = 256;

// Minimum resident blocks per SM: it leaves the compiler 40 registers a thread.
constexpr int kBlocks = 6;

// Arguments of a kernel are at most 32,764 bytes; a launch copies all of them, so small steps have a small table.
constexpr int kSmall = 4096, kLarge = 32760;

// The argument of a kernel: the pointers and counts that it needs, then arrays.
template <class Head, int kBytes>
struct Table {
  Head head;
  alignas(8) unsigned char bytes[kBytes - sizeof(Head)];

  template <class T>
  __device__ const T* at(int offset) const {
    return reinterpret_cast<const T*>(bytes + offset);
  }
};

// Heads of tables of tensors. The arrays are `count` tensors, the rows that they use (none if those are in device
// memory), and the number of tiles before each tensor and of all. A block works on one tile.
struct Apply {
  const Row<double>* device_rows;
  const int32_t* skip;
  int32_t count, tiles_at;

  // Fastest on an H100: 2048 elements were 1 % slower for float32, and 1024 were 2 to 6 % slower for bfloat16.
  TEXP_INLINE static int64_t tile_of(Dtypes dtypes) { return dtypes.p() == Dtype::float32 ? 1024 : 2048; }
};

struct Reduce {
  double* workspace;  // for each tile a sum of p² and a sum of g²
  double* sums;       // for each tensor likewise
  int32_t count, tiles_at;
  Reduction reduction;

  TEXP_INLINE static int64_t tile_of(Dtypes) { return 8192; }
};

// The array is where the DeviceScale of each of `count` tensors is. Several launches make one norm.
struct Norm {
  const double* sums;  // of the first of the tensors
  const float* grad_scale;
  double* norm;  // between the launches, what those before have made of their tensors
  int32_t count;
  bool is_max, is_first, is_last;
};

// The arrays are `count` groups, and the requests from `begin` to `end` among all of the step.
struct Advance {
  DeviceStep step;
  int32_t count, begin, end;
};

// Tells the compiler that a pointer from a table is one to global memory.
template <class E>
__device__ E& global(E* p) {
  __builtin_assume(__isGlobal(p));
  return *p;
}

__device__ float widened(float x) { return x; }
__device__ double widened(double x) { return x; }
__device__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widened(__half x) { return __half2float(x); }

__device__ void narrow(double x, double& to) { to = x; }
__device__ void narrow(float x, float& to) { to = x; }
__device__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ void narrow(float x, __half& to) { to = __float2half_rn(x); }
template <class E>
__device__ void narrow(double x, E& to) {
  narrow(static_cast<float>(x), to);
}

// Calls f with an element of that dtype.
template <class F>
__device__ void with_element(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32: return f(float{});
    case Dtype::float64: return f(double{});
    case Dtype::bfloat16: return f(__nv_bfloat16{});
    case Dtype::float16: return f(__half{});
  }
}

template <class E, int kCount>
struct alignas(sizeof(E) * kCount) Vector {
  E e[kCount];
};

template <class T, class E, int kCount>
__device__ void widen(const Vector<E, kCount>& from, T (&to)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) to[k] = widened(from.e[k]);
}

template <class T, class E, int kCount>
__device__ void narrow(const T (&from)[kCount], Vector<E, kCount>& to) {
  Vector<E, kCount> v;
#pragma unroll
  for (int k = 0; k < kCount; ++k) narrow(from[k], v.e[k]);
  to = v;
}

// A tensor from some element on, whose dtype E is known to the compiler. Where there is none, it reads as 0.
template <class E>
struct Known {
  E* at;

  __device__ Known(const void* tensor, Dtype, int64_t offset)
      : at(tensor == nullptr ? nullptr : static_cast<E*>(const_cast<void*>(tensor)) + offset) {}

  __device__ uintptr_t misaligned(int count) const { return reinterpret_cast<uintptr_t>(at) & (count * sizeof(E) - 1); }

  template <int kCount>
  __device__ Vector<E, kCount> load(int i) const {
    using V = Vector<E, kCount>;
    return at == nullptr ? V{} : global(reinterpret_cast<const V*>(at + i));
  }

  template <class T, int kCount>
  __device__ void store(int i, const T (&from)[kCount]) const {
    Vector<E, kCount> v;
    narrow(from, v);
    if (at != nullptr) global(reinterpret_cast<Vector<E, kCount>*>(at + i)) = v;
  }
};

// The same where the dtype is known only to the running kernel; no element is wider than T.
template <class T>
struct Mixed {
  static constexpr Dtype kNone{4};

  char* at;
  Dtype dtype;  // kNone where there is no tensor, so that at is tested only once

  __device__ static int size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

  __device__ Mixed(const void* tensor, Dtype dtype, int64_t offset)
      : at(static_cast<char*>(const_cast<void*>(tensor)) + offset * size_of(dtype)),
        dtype(tensor == nullptr ? kNone : dtype) {}

  __device__ uintptr_t misaligned(int count) const {
    return dtype == kNone ? 0 : reinterpret_cast<uintptr_t>(at) & (count * size_of(dtype) - 1);
  }

  template <int kCount>
  __device__ Vector<T, kCount> load(int i) const {
    Vector<T, kCount> to{};
    with_vector<kCount>(i, [&](const auto& v) { widen(v, to.e); });
    return to;
  }

  template <int kCount>
  __device__ void store(int i, const T (&from)[kCount]) const {
    with_vector<kCount>(i, [&](auto& v) { narrow(from, v); });
  }

 private:
  template <int kCount, class F>
  __device__ void with_vector(int i, const F& f) const {
    with_element(dtype, [&](auto e) {
      using E = decltype(e);
      if constexpr (sizeof(E) <= sizeof(T)) f(global(reinterpret_cast<Vector<E, kCount>*>(at + i * sizeof(E))));
    });
  }
};

template <int kCount, class T, class P, class G, class B>
__device__ void update_elements(const Row<T>& row, const P& p, const G& g, const B& b, int begin, int end) {
#pragma unroll 1
  for (int i = begin + threadIdx.x * kCount; i < end; i += kThreads * kCount) {
    const auto p_loaded = p.template load<kCount>(i);
    const auto g_loaded = g.template load<kCount>(i);
    const auto b_loaded = b.template load<kCount>(i);
    T weights[kCount], gradients[kCount], buffers[kCount];
    widen(p_loaded, weights);
    widen(g_loaded, gradients);
    widen(b_loaded, buffers);
#pragma unroll
    for (int k = 0; k < kCount; ++k) update<T>(row, weights[k], gradients[k], buffers[k]);
    p.store(i, weights);
    b.store(i, buffers);
  }
}

// kCount: how many elements a thread loads at once, if all are aligned to that.
template <int kCount, class P, class G, class B, class T>
__device__ void update_tile(const Row<T>& row, const TensorEntry& t, int64_t offset, int n) {
  const P p(t.p, t.dtypes.p(), offset);
  const G g(t.g, t.dtypes.g(), offset);
  const B b(t.b, t.dtypes.b(), offset);
  const bool aligned = (p.misaligned(kCount) | g.misaligned(kCount) | b.misaligned(kCount)) == 0;
  const int whole = kCount == 1 ? 0 : aligned ? n / kCount * kCount : 0;
  if constexpr (kCount > 1) update_elements<kCount>(row, p, g, b, 0, whole);
  update_elements<1>(row, p, g, b, whole, n);
}

// The tensor of a tile, where in it the tile begins, and how many elements it has.
struct Place {
  int32_t tensor;
  int64_t offset;
  int n;
};

template <class Head, int kBytes>
__device__ Place place_of(const Table<Head, kBytes>& table, int32_t tile) {
  const int32_t* tiles = table.template at<int32_t>(table.head.tiles_at);
  const int32_t i = tensor_of(tile, tiles, table.head.count);
  const TensorEntry& t = table.template at<TensorEntry>(0)[i];
  const int64_t size = Head::tile_of(t.dtypes), offset = (tile - tiles[i]) * size;
  return {i, offset, static_cast<int>(t.numel - offset < size ? t.numel - offset : size)};
}

// kMixed: for any dtypes, and launched if Dtypes::is_usual is false for any tensor. A kernel of its own, so that the
// usual one does not carry its instructions.
template <bool kMixed, int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocks) apply_kernel(const __grid_constant__ Table<Apply, kBytes> table) {
  __shared__ Row<double> wide;
  __shared__ Row<float> narrow;
  const Apply& head = table.head;
  const Place place = place_of(table, blockIdx.x);
  const TensorEntry& t = table.template at<TensorEntry>(0)[place.tensor];
  const bool has_number = threadIdx.x < 10;  // of the row
  double number = 0;
  int32_t skip = 0;
  if (head.device_rows != nullptr) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");  // until advance has done all of its work
#endif
    if (has_number) number = global(&head.device_rows[t.row].a_b + threadIdx.x);
    skip = global(head.skip);
  } else if (has_number) {
    const auto* rows = table.template at<Row<double>>(head.count * int{sizeof(TensorEntry)});
    number = (&rows[t.row].a_b)[threadIdx.x];
  }
  if (skip != 0) return;
  if (has_number) {
    (&wide.a_b)[threadIdx.x] = number;
    (&narrow.a_b)[threadIdx.x] = static_cast<float>(number);
  }
  __syncthreads();

  if constexpr (kMixed) {
    t.dtypes.is_wide()
        ? update_tile<1, Mixed<double>, Mixed<double>, Mixed<double>>(wide, t, place.offset, place.n)
        : update_tile<2, Mixed<float>, Mixed<float>, Mixed<float>>(narrow, t, place.offset, place.n);
  } else {
    with_element(t.dtypes.p(), [&](auto e) {
      using P = Known<decltype(e)>;
      // 16 bytes of float32. Of other dtypes fewer: wider loads would take more registers, and were no faster.
      if constexpr (sizeof(e) == 8) {
        update_tile<1, P, P, P>(wide, t, place.offset, place.n);
      } else if (sizeof(e) == 4 || t.dtypes.b() == t.dtypes.p()) {
        update_tile<4, P, P, P>(narrow, t, place.offset, place.n);
      } else {
        update_tile<4, P, P, Known<float>>(narrow, t, place.offset, place.n);
      }
    });
  }
}

__device__ double read(const Number& number, Number::In in) {
  if (in == Number::In::float32) return global(static_cast<const float*>(number.at));
  if (in == Number::In::float64) return global(static_cast<const double*>(number.at));
  return number.value;
}

// One block for each group.
template <int kBytes>
__global__ void __launch_bounds__(kThreads) advance_kernel(const __grid_constant__ Table<Advance, kBytes> table) {
  __shared__ Row<double> running, first, idle;
  __shared__ double growth, lr, weight_decay, grad_scale;
  __shared__ bool has_momentum;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");  // apply may be launched from here on
#endif
  const Advance& head = table.head;
  const DeviceStep& step = head.step;
  const bool clips = step.norm != nullptr;
  const bool skipped = (step.found_inf != nullptr && global(step.found_inf) != 0) ||
                       (clips && step.skips_nonfinite && !std::isfinite(global(step.norm)));
  if (blockIdx.x == 0 && threadIdx.x == 0) global(step.skip) = skipped;
  if (skipped) return;

  const GroupEntry& group = table.template at<GroupEntry>(0)[blockIdx.x];
  if (threadIdx.x == 0) {
    DeviceScale& scale = global(group.scale);
    const Hyperparameters h{read(group.lr, group.in[0]),        read(group.momentum, group.in[1]),
                            read(group.dampening, group.in[2]), read(group.weight_decay, group.in[3]),
                            group.nesterov,                     group.maximize,
                            group.scale_invariant,              group.trust};
    const bool momentum_initialized = !group.without_buffers && scale.momentum_initialized != 0;
    grad_scale = step.grad_scale == nullptr ? 1.0 : global(step.grad_scale);
    if (clips) grad_scale /= clip_factor(global(step.norm), step.max_norm);
    const Step next = advance({scale.P, scale.exponent, scale.kappa}, h, !momentum_initialized, grad_scale);
    running = next.running;
    first = next.first;
    idle = next.idle;
    growth = next.growth;
    lr = h.lr;
    weight_decay = h.weight_decay;
    has_momentum = h.momentum != 0;
    // If not, the next launch computes the same step for the rest of its requests.
    if (group.end <= head.end)
      scale = {next.scale.P, next.scale.kappa, next.scale.exponent, momentum_initialized || has_momentum};
  }
  __syncthreads();

  const auto* requests = table.template at<RowRequest>(head.count * int{sizeof(GroupEntry)});
  const int begin = group.begin < head.begin ? head.begin : group.begin;
  const int end = group.end < head.end ? group.end : head.end;
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    const RowRequest& request = requests[i - head.begin];
    Row<double>& row = global(step.rows + i);
    if (request.kind == RowKind::statistic) {
      row = {};
      row.s_p = power_of(growth, request.power);
      continue;
    }
    uint8_t* slot = step.momentum_initialized + request.slot;
    const bool empty = request.has_buffer && (request.newly_allocated || global(slot) == 0);
    if (request.kind == RowKind::idle) {
      row = idle;
      if (empty) row.a_p = 0;  // its buffer is 0 and stays 0
    } else {
      const Row<double>& of_group = has_momentum && empty ? first : running;
      if (group.trust.is_used) {
        const Hyperparameters h{.lr = lr, .weight_decay = weight_decay, .trust = group.trust};
        const double p_norm = std::sqrt(global(step.sums + 2 * i)), g_norm = std::sqrt(global(step.sums + 2 * i + 1));
        row = with_ratio(of_group, trust_ratio(h, p_norm, g_norm / std::abs(grad_scale)));
      } else {
        row = of_group;
      }
      if (has_momentum && request.has_buffer) global(slot) = 1;
    }
  }
}

// NaN where one is, unlike fmax.
template <class T>
__device__ T larger(T a, T b) {
  return a > b || a != a ? a : b;
}

__device__ double joined(double a, double b, bool is_max) { return is_max ? larger(a, b) : a + b; }

// The sum, or the maximum, over all threads, for the first one, in a fixed order: 16 threads join 16 numbers each, then
// one joins theirs.
__device__ double over_block(double x, bool is_max) {
  __shared__ double of[kThreads];
  constexpr unsigned kPart = 16;
  of[threadIdx.x] = x;
  __syncthreads();
  if (threadIdx.x < kPart) {
    for (unsigned i = threadIdx.x + kPart; i < kThreads; i += kPart) x = joined(x, of[i], is_max);
    of[threadIdx.x] = x;
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (unsigned i = 1; i < kPart; ++i) x = joined(x, of[i], is_max);
  return x;
}

// Which of the sums, of a tile or of a tensor, is that of the block: the even ones are of p, the odd ones of g.
__device__ unsigned sum_of_block(const Reduce& head) {
  return head.reduction == Reduction::squares ? blockIdx.x : 2 * blockIdx.x + 1;
}

// Two blocks for each tile: one for p, one for g. Where p is not read, only the latter.
template <int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocks)
    reduce_kernel(const __grid_constant__ Table<Reduce, kBytes> table) {
  const unsigned index = sum_of_block(table.head);
  const bool of_g = index % 2, is_max = table.head.reduction == Reduction::grad_max;
  const Place place = place_of(table, index / 2);
  const TensorEntry& t = table.template at<TensorEntry>(0)[place.tensor];
  const Dtype dtype = of_g ? t.dtypes.g() : t.dtypes.p();
  double result = 0;
  with_element(dtype, [&](auto e) {
    using E = decltype(e);
    using T = decltype(widened(e));
    constexpr int kCount = 16 / sizeof(E);
    const Known<E> x(of_g ? t.g : t.p, dtype, place.offset);
    if (x.at == nullptr) return;
    const int whole = x.misaligned(kCount) == 0 ? place.n / kCount * kCount : 0;
    const auto for_all = [&](const auto& take) {
      const auto take_all = [&](const auto& v) {
        for (const E one : v.e) take(widened(one));
      };
#pragma unroll 4
      for (int i = threadIdx.x * kCount; i < whole; i += kThreads * kCount) take_all(x.template load<kCount>(i));
      for (int i = whole + static_cast<int>(threadIdx.x); i < place.n; i += kThreads) take_all(x.template load<1>(i));
    };
    if (is_max) {
      T most = 0;
      for_all([&](T one) { most = larger(std::fabs(one), most); });
      result = most;
    } else {
      for_all([&](T one) { result = fused(double(one), double(one), result); });
    }
  });
  result = over_block(result, is_max);
  if (threadIdx.x == 0) global(table.head.workspace + index) = result;
}

// Two blocks for each tensor, or one, likewise.
template <int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocks) sum_kernel(const __grid_constant__ Table<Reduce, kBytes> table) {
  const unsigned index = sum_of_block(table.head);
  const bool is_max = table.head.reduction == Reduction::grad_max;
  const int32_t* tiles = table.template at<int32_t>(table.head.tiles_at) + index / 2;
  double result = 0;
  for (int32_t tile = tiles[0] + static_cast<int32_t>(threadIdx.x); tile < tiles[1]; tile += kThreads)
    result = joined(result, global(table.head.workspace + 2 * tile + index % 2), is_max);
  result = over_block(result, is_max);
  if (threadIdx.x == 0) global(table.head.sums + index) = result;
}

// One block.
template <int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocks) norm_kernel(const __grid_constant__ Table<Norm, kBytes> table) {
  const Norm& head = table.head;
  const auto* scales = table.template at<const DeviceScale*>(0);
  double result = 0;
  for (int i = threadIdx.x; i < head.count; i += kThreads) {
    const double P = global(scales[i]).P, of_g = global(head.sums + 2 * i + 1);
    result = joined(result, head.is_max ? P * of_g : P * P * of_g, head.is_max);
  }
  result = over_block(result, head.is_max);
  if (threadIdx.x != 0) return;
  double& norm = global(head.norm);
  if (!head.is_first) result = joined(norm, result, head.is_max);
  if (head.is_last) {
    if (!head.is_max) result = std::sqrt(result);
    if (head.grad_scale != nullptr) result /= global(head.grad_scale);
  }
  norm = result;
}

// By device, whether its apply kernels wait for advance by themselves, so that they may be launched while that runs:
// programmatic dependent launch, which saves 1.5 µs. Those compiled for less than 9.0 do not. Known once they are loaded.
constexpr int kMostDevices = 64;
bool waits_for_advance[kMostDevices];

// Each for both sizes of table.
const std::pair kApply{&apply_kernel<false, kSmall>, &apply_kernel<false, kLarge>};
const std::pair kApplyMixed{&apply_kernel<true, kSmall>, &apply_kernel<true, kLarge>};
const std::pair kAdvance{&advance_kernel<kSmall>, &advance_kernel<kLarge>};
const std::pair kReduce{&reduce_kernel<kSmall>, &reduce_kernel<kLarge>};
const std::pair kSum{&sum_kernel<kSmall>, &sum_kernel<kLarge>};
const std::pair kNorm{&norm_kernel<kSmall>, &norm_kernel<kLarge>};

// Launches the kernel for the smaller table if the arrays, of that many bytes, fit into it: both tables begin alike.
template <class Kernels, class Head>
cudaError_t launch(const Kernels& kernels, int64_t blocks, Table<Head, kLarge>& table, size_t bytes, void* stream,
                   bool after_advance = false) {
  if (blocks == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  const auto launch_one = [&](auto* kernel, auto& argument) {
    if (after_advance) {
      cudaLaunchAttribute overlap{};
      overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      overlap.val.programmaticStreamSerializationAllowed = 1;
      const cudaLaunchConfig_t config{grid, block, 0, static_cast<cudaStream_t>(stream), &overlap, 1};
      cudaLaunchKernelEx(&config, kernel, argument);
    } else {
      void* arguments[] = {&argument};
      cudaLaunchKernel(kernel, grid, block, arguments, 0, static_cast<cudaStream_t>(stream));
    }
  };
  if (bytes <= sizeof(Table<Head, kSmall>::bytes)) {
    launch_one(kernels.first, reinterpret_cast<Table<Head, kSmall>&>(table));
  } else {
    launch_one(kernels.second, table);
  }
  return cudaGetLastError();  // and leaves none for the next launch of somebody else
}

// Calls f while that device is the current one. Returns null, or what CUDA says went wrong.
template <class F>
const char* on_device(int device, const F& f) {
  int before = device;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = f();
  if (before != device) cudaSetDevice(before);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Fills a table with as many tensors as it holds, and with their rows if `rows` is not null, and calls `use` with it, how
// many tiles and bytes it has, and whether Dtypes::is_usual is false for any tensor, until all tensors have had their
// turn.
template <class Head, class Use>
const char* for_all(int device, const Head& head, const TensorEntry* tensors, int64_t n, const Row<double>* rows,
                    const Use& use) {
  Table<Head, kLarge> table;
  table.head = head;
  constexpr size_t capacity = sizeof table.bytes, each = sizeof(TensorEntry) + sizeof(int32_t);
  Row<double> used[capacity / sizeof(Row<double>)];
  int32_t first[capacity / each + 1];
  auto* const to = reinterpret_cast<TensorEntry*>(table.bytes);
  return on_device(device, [&] {
    cudaError_t error = cudaSuccess;
    for (int64_t i = 0; i < n && error == cudaSuccess;) {
      int32_t count = 0, n_rows = 0;
      int64_t tiles = 0;  // each of at least 2 KB: no memory has 2^31 of them
      size_t bytes = sizeof(int32_t);
      bool mixed = false;
      for (; i < n; ++i) {
        const TensorEntry& t = tensors[i];
        const bool new_row = rows != nullptr && (count == 0 || t.row != tensors[i - 1].row);
        if (bytes + each + new_row * sizeof(Row<double>) > capacity) break;
        bytes += each + new_row * sizeof(Row<double>);
        if (new_row) used[n_rows++] = rows[t.row];
        to[count] = t;
        if (rows != nullptr) to[count].row = n_rows - 1;
        first[count++] = static_cast<int32_t>(tiles);
        tiles += tiles_of(t.numel, Head::tile_of(t.dtypes));
        mixed |= !t.dtypes.is_usual();
      }
      first[count] = static_cast<int32_t>(tiles);
      table.head.count = count;
      table.head.tiles_at = static_cast<int32_t>(count * sizeof(TensorEntry) + n_rows * sizeof(Row<double>));
      memcpy(to + count, used, n_rows * sizeof(Row<double>));
      memcpy(table.bytes + table.head.tiles_at, first, (count + 1) * sizeof(int32_t));
      error = use(table, tiles, bytes, mixed);
    }
    return error;
  });
}

}  // namespace
}  // namespace texp::cuda

using namespace texp;
using namespace texp::cuda;

extern "C" const char* texp_cuda_apply(int device, void* stream, const TensorEntry* tensors, int64_t n,
                                       const Row<double>* rows, const Row<double>* device_rows, const int32_t* skip) {
  bool after_advance = device_rows != nullptr && waits_for_advance[device % kMostDevices];
  return for_all(device, Apply{device_rows, skip, 0, 0}, tensors, n, rows,
                 [&](auto& table, int64_t tiles, size_t bytes, bool mixed) {
                   return launch(mixed ? kApplyMixed : kApply, tiles, table, bytes, stream,
                                 std::exchange(after_advance, false));
                 });
}

extern "C" const char* texp_cuda_advance(int device, void* stream, const GroupEntry* groups, int64_t n_groups,
                                         const RowRequest* requests, int64_t, const DeviceStep& step) {
  Table<Advance, kLarge> table;
  return on_device(device, [&] {
    cudaError_t error = cudaSuccess;
    for (int32_t group = 0, begin = 0; group < n_groups && error == cudaSuccess;) {
      int32_t count = 0, end = begin;
      size_t free = sizeof table.bytes;
      while (group + count < n_groups && free >= sizeof(GroupEntry) + sizeof(RowRequest)) {
        free -= sizeof(GroupEntry);
        const int32_t more = std::min(groups[group + count++].end - end, static_cast<int32_t>(free / sizeof(RowRequest)));
        end += more;
        free -= more * sizeof(RowRequest);
      }
      table.head = {step, count, begin, end};
      memcpy(table.bytes, groups + group, count * sizeof(GroupEntry));
      memcpy(table.bytes + count * sizeof(GroupEntry), requests + begin, (end - begin) * sizeof(RowRequest));
      error = launch(kAdvance, count, table, sizeof table.bytes - free, stream);
      group += count - (end < groups[group + count - 1].end);  // the last one goes on in the next launch
      begin = end;
    }
    return error;
  });
}

extern "C" int64_t texp_cuda_reduce_workspace(const TensorEntry* tensors, int64_t n) {
  int64_t tiles = 0;
  for (const TensorEntry* t = tensors; t != tensors + n; ++t) tiles += tiles_of(t->numel, Reduce::tile_of(t->dtypes));
  return 2 * tiles;
}

extern "C" const char* texp_cuda_reduce(int device, void* stream, const TensorEntry* tensors, int64_t n,
                                        Reduction reduction, double* sums, double* workspace) {
  const int64_t each = reduction == Reduction::squares ? 2 : 1;  // blocks
  return for_all(device, Reduce{workspace, sums, 0, 0, reduction}, tensors, n, nullptr,
                 [&](auto& table, int64_t tiles, size_t bytes, bool) {
                   cudaError_t error = launch(kReduce, each * tiles, table, bytes, stream);
                   if (error == cudaSuccess) error = launch(kSum, each * table.head.count, table, bytes, stream);
                   table.head.sums += 2 * table.head.count;
                   return error;
                 });
}

extern "C" const char* texp_cuda_norm(int device, void* stream, const GroupEntry* groups, const RowRequest* requests,
                                      int64_t n, Reduction reduction, const double* sums, const float* grad_scale,
                                      double* norm) {
  Table<Norm, kLarge> table;
  auto* const scales = reinterpret_cast<const DeviceScale**>(table.bytes);
  constexpr int64_t capacity = sizeof table.bytes / sizeof *scales;
  return on_device(device, [&] {
    cudaError_t error = cudaSuccess;
    int64_t begin = 0;
    do {
      const auto count = static_cast<int32_t>(std::min(n - begin, capacity));
      table.head = {.sums = sums + 2 * begin,
                    .grad_scale = grad_scale,
                    .norm = norm,
                    .count = count,
                    .is_max = reduction == Reduction::grad_max,
                    .is_first = begin == 0,
                    .is_last = begin + count == n};
      for (int32_t i = 0; i < count; ++i) scales[i] = groups[requests[begin + i].group].scale;
      error = launch(kNorm, 1, table, count * sizeof *scales, stream);
      begin += count;
    } while (begin < n && error == cudaSuccess);
    return error;
  });
}

extern "C" const char* texp_cuda_load(int device) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    cudaError_t error = cudaSuccess;
    const auto load = [&](auto* kernel) {
      if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    };
    const auto load_both = [&](const auto&... kernels) { ((load(kernels.first), load(kernels.second)), ...); };
    load_both(kApply, kApplyMixed, kAdvance, kReduce, kSum, kNorm);
    waits_for_advance[device % kMostDevices] = error == cudaSuccess && attributes.ptxVersion >= 90;
    return error;
  });
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
