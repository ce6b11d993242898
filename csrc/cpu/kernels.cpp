// Reduce and apply on the CPU: all tensors of all groups as one index space, split once over torch's threads.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"
#include "../math/tiles.h"

namespace texp {
namespace {

// Conversions are written on the bits, for every compiler to vectorise; both round to nearest even.

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

TEXP_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

TEXP_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

TEXP_INLINE float load(float x) { return x; }
TEXP_INLINE double load(double x) { return x; }
TEXP_INLINE float load(bf16 x) { return float_of(uint32_t{x.bits} << 16); }

TEXP_INLINE float load(fp16 x) {
  const uint32_t sign = (uint32_t{x.bits} & 0x8000u) << 16;
  const uint32_t magnitude = (uint32_t{x.bits} & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  // The exponent is rebiased by 112; infinities and NaN get as much again; subnormals are renormalised by a subtraction.
  const uint32_t rebiased = magnitude + (112u << 23);
  const float normal = float_of(exponent == 0x0f800000u ? rebiased + (112u << 23) : rebiased);
  const float subnormal = float_of(rebiased + (1u << 23)) - float_of(113u << 23);
  return float_of(bits_of(exponent == 0 ? subnormal : normal) | sign);
}

TEXP_INLINE void store(float& to, float x) { to = x; }
TEXP_INLINE void store(double& to, double x) { to = x; }

TEXP_INLINE void store(bf16& to, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

TEXP_INLINE void store(fp16& to, float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Adding 1/2 leaves a float whose last place is that of a subnormal half.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  to.bits = static_cast<uint16_t>((magnitude >= (143u << 23) ? special : finite) | (bits >> 16 & 0x8000u));
}

#if defined(__clang__)
#define TEXP_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define TEXP_VECTORIZE _Pragma("GCC ivdep")
#endif

template <class T, class P, class B, bool has_grad, bool has_buf, bool heavy_ball>
TEXP_INLINE void span(const Row<T>& row, P* p, const P* g, B* b, int64_t n) {
  const Row<T> r = row;
  // p and g may be one tensor, but no element depends on another.
  TEXP_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    T weight = load(p[i]);
    T buffer = has_buf ? load(b[i]) : T(0);
    const T gradient = has_grad ? load(g[i]) : T(0);
    if constexpr (heavy_ball) {
      update_heavy_ball<T>(r, weight, gradient, buffer);
    } else {
      update<T>(r, weight, gradient, buffer);
    }
    store(p[i], weight);
    if (has_buf) store(b[i], buffer);
  }
}

template <class T, class P, class B>
TEXP_INLINE void span(const Row<T>& row, const TensorEntry& t, int64_t offset, int64_t n) {
  P* p = static_cast<P*>(t.p) + offset;
  const P* g = static_cast<const P*>(t.g) + (t.g ? offset : 0);
  B* b = static_cast<B*>(t.b) + (t.b ? offset : 0);
  if (g && b && is_heavy_ball(row)) return span<T, P, B, true, true, true>(row, p, g, b, n);
  if (g && b) return span<T, P, B, true, true, false>(row, p, g, b, n);
  if (g) return span<T, P, B, true, false, false>(row, p, g, b, n);
  if (b) return span<T, P, B, false, true, false>(row, p, g, b, n);
  return span<T, P, B, false, false, false>(row, p, g, b, n);
}

// Of dtypes that are usual.
TEXP_INLINE void span(const TensorEntry& t, const Rows& rows, int64_t offset, int64_t n) {
  const Row<float>& row = rows.narrow[t.row];
  const bool own = t.dtypes.b() == t.dtypes.p();
  switch (t.dtypes.p()) {
    case Dtype::float32:
      return span<float, float, float>(row, t, offset, n);
    case Dtype::float64:
      return span<double, double, double>(rows.wide[t.row], t, offset, n);
    case Dtype::bfloat16:
      return own ? span<float, bf16, bf16>(row, t, offset, n) : span<float, bf16, float>(row, t, offset, n);
    case Dtype::float16:
      return own ? span<float, fp16, fp16>(row, t, offset, n) : span<float, fp16, float>(row, t, offset, n);
  }
}

// Elements. A thread takes a run of tiles as one, so that small ones cost nothing; threads get equal numbers of tiles, so
// that many tensors smaller than a tile would make for unequal shares. A multiple of a cache line for every dtype.
constexpr int64_t kTile = 256;

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, double> ? Dtype::float64 : Dtype::float32;

// Calls `each` with the n elements of a tensor from `offset` on, as what they are. There is no float64 where T is float.
template <class T, class F>
TEXP_INLINE void as_elements(void* tensor, Dtype dtype, int64_t offset, F&& each) {
  switch (dtype) {
    case Dtype::float32: return each(static_cast<float*>(tensor) + offset);
    case Dtype::float64:
      if constexpr (std::is_same_v<T, double>) each(static_cast<double*>(tensor) + offset);
      return;
    case Dtype::bfloat16: return each(static_cast<bf16*>(tensor) + offset);
    case Dtype::float16: return each(static_cast<fp16*>(tensor) + offset);
  }
}

// n elements as T: where they are if they are T, otherwise copied to `to`; null stays null.
template <class T>
TEXP_INLINE void* widened(void* tensor, Dtype dtype, int64_t offset, int64_t n, T* to) {
  if (tensor == nullptr) return nullptr;
  if (dtype == kDtype<T>) return static_cast<T*>(tensor) + offset;
  as_elements<T>(tensor, dtype, offset, [=](const auto* from) __attribute__((always_inline)) {
    TEXP_VECTORIZE
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(load(from[i]));
  });
  return to;
}

// The way back, of what was copied.
template <class T>
TEXP_INLINE void narrow(void* tensor, Dtype dtype, int64_t offset, int64_t n, const T* from) {
  if (tensor == nullptr || dtype == kDtype<T>) return;
  as_elements<T>(tensor, dtype, offset, [=](auto* to) __attribute__((always_inline)) {
    TEXP_VECTORIZE
    for (int64_t i = 0; i < n; ++i) store(to[i], static_cast<float>(from[i]));
  });
}

using Span = void (*)(const TensorEntry&, const Rows&, int64_t, int64_t);

// Of any mix of dtypes: tile by tile by way of T, which `self` takes. Those are small enough to stay in the first cache.
template <class T, Span self>
TEXP_INLINE void span_mixed(const TensorEntry& t, const Rows& rows, int64_t offset, int64_t n) {
  alignas(64) T weights[kTile], gradients[kTile], buffers[kTile];
  for (const int64_t end = offset + n; offset < end; offset += kTile) {
    const int64_t count = std::min(kTile, end - offset);
    TensorEntry tile = t;
    tile.p = widened(t.p, t.dtypes.p(), offset, count, weights);
    tile.g = widened(const_cast<void*>(t.g), t.dtypes.g(), offset, count, gradients);
    tile.b = widened(t.b, t.dtypes.b(), offset, count, buffers);
    tile.dtypes = Dtypes::of(kDtype<T>, kDtype<T>, kDtype<T>);
    self(tile, rows, 0, count);
    narrow(t.p, t.dtypes.p(), offset, count, weights);
    narrow(t.b, t.dtypes.b(), offset, count, buffers);
  }
}

template <Span self>
TEXP_INLINE void span(const TensorEntry& t, const Rows& rows, int64_t offset, int64_t n) {
  if (t.dtypes.is_usual()) return span(t, rows, offset, n);
  if (t.dtypes.is_wide()) return span_mixed<double, self>(t, rows, offset, n);
  span_mixed<float, self>(t, rows, offset, n);
}

// Sums are made of tiles of so many elements, each in float64 and by so many running sums, whatever runs them.
constexpr int64_t kSumTile = 4096;
constexpr int kLanes = 16;

struct Squares {
  TEXP_INLINE static double of(double x) { return x * x; }
  TEXP_INLINE static double combine(double a, double b) { return a + b; }
};

struct Largest {
  TEXP_INLINE static double of(double x) { return std::abs(x); }
  TEXP_INLINE static double combine(double a, double b) { return b > a || b != b ? b : a; }  // NaN stays NaN
};

// Of one tile.
template <class Sum>
TEXP_INLINE double reduce(const void* tensor, Dtype dtype, int64_t offset, int64_t n) {
  if (tensor == nullptr) return 0;
  double lanes[kLanes] = {};
  as_elements<double>(const_cast<void*>(tensor), dtype, offset, [&](const auto* x) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = Sum::combine(lanes[lane], Sum::of(load(x[i + lane])));
    for (int lane = 0; i < n; ++i, ++lane) lanes[lane] = Sum::combine(lanes[lane], Sum::of(load(x[i])));
  });
  double sum = 0;
  for (const double of : lanes) sum = Sum::combine(sum, of);
  return sum;
}

TEXP_INLINE double reduce(const void* tensor, Dtype dtype, int64_t offset, int64_t n, bool max) {
  return max ? reduce<Largest>(tensor, dtype, offset, n) : reduce<Squares>(tensor, dtype, offset, n);
}

// The same code for each instruction set; which one runs is decided once, by what the processor has.
#define TEXP_VARIANT(name, target)                                                                       \
  target void span_##name(const TensorEntry& t, const Rows& rows, int64_t offset, int64_t n) {           \
    span<span_##name>(t, rows, offset, n);                                                               \
  }                                                                                                      \
  target double reduce_##name(const void* tensor, Dtype dtype, int64_t offset, int64_t n, bool max) {    \
    return reduce(tensor, dtype, offset, n, max);                                                        \
  }

TEXP_VARIANT(any, )
#if defined(__x86_64__) && defined(__GNUC__)
TEXP_VARIANT(avx2, __attribute__((target("avx2,fma"))))
#if defined(__clang__)  // whose vectors are as wide as this without being asked
#define TEXP_WIDE ""
#else
#define TEXP_WIDE ",prefer-vector-width=512"
#endif
TEXP_VARIANT(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma" TEXP_WIDE))))
#endif

struct Variant {
  std::string name;
  Span span;
  double (*reduce)(const void* tensor, Dtype dtype, int64_t offset, int64_t n, bool max);
};

// Those that this processor can run, the best first.
const std::vector<Variant>& variants() {
  static const std::vector<Variant> found = [] {
    std::vector<Variant> all;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512) all.push_back({"avx512", span_avx512, reduce_avx512});
    if (avx2) all.push_back({"avx2", span_avx2, reduce_avx2});
#endif
    all.push_back({"any", span_any, reduce_any});
    return all;
  }();
  return found;
}

const Variant nothing{"nothing", [](const TensorEntry&, const Rows&, int64_t, int64_t) {},
                      [](const void*, Dtype, int64_t, int64_t, bool) { return 0.0; }};

const Variant* chosen = &variants().front();

// Fewer elements than this are not worth waking another thread for; torch's own threshold.
constexpr int64_t kGrain = 32768;

// Calls run(begin, end) for all tiles, which have so many elements in all.
template <class Run>
void in_parallel(int64_t tiles, int64_t elements, const Run& run) {
  if (elements <= kGrain) {
    run(0, tiles);
  } else {
    at::parallel_for(0, tiles, std::max<int64_t>(1, kGrain / (elements / tiles)), run);
  }
}

}  // namespace

void Tiles::make(const TensorEntry* tensors, int64_t n) {
  first.resize(n + 1);
  elements = 0;
  for (int64_t i = 0; i < n; ++i) {
    first[i + 1] = first[i] + tiles_of(tensors[i].numel, kTile);
    elements += tensors[i].numel;
  }
}

void cpu::apply(const TensorEntry* tensors, int64_t n, const Tiles& tiles, const Rows& rows) {
  const int64_t* first = tiles.first.data();
  const auto run = [&](int64_t tile, int64_t end) {
    for (int64_t i = tile < end ? tensor_of(tile, first, n) : n; tile < end; ++i) {
      const int64_t stop = std::min(end, first[i + 1]);
      if (tile == stop) continue;  // an empty tensor
      const int64_t offset = (tile - first[i]) * kTile;
      chosen->span(tensors[i], rows, offset, std::min(tensors[i].numel, (stop - first[i]) * kTile) - offset);
      tile = stop;
    }
  };
  in_parallel(first[n], tiles.elements, run);
}

void cpu::reduce(const TensorEntry* tensors, int64_t n, Reduction reduction, double* sums) {
  const bool max = reduction == Reduction::grad_max, reads_p = reduction == Reduction::squares;
  std::vector<int64_t> first(n + 1);
  int64_t elements = 0;
  for (int64_t i = 0; i < n; ++i) {
    first[i + 1] = first[i] + tiles_of(tensors[i].numel, kSumTile);
    elements += tensors[i].numel;
  }
  std::vector<double> parts(2 * first[n]);
  const auto run = [&](int64_t tile, int64_t end) {
    for (int64_t i = tile < end ? tensor_of(tile, first.data(), n) : n; tile < end; ++tile) {
      while (first[i + 1] <= tile) ++i;
      const TensorEntry& t = tensors[i];
      const int64_t offset = (tile - first[i]) * kSumTile, count = std::min(kSumTile, t.numel - offset);
      if (reads_p) parts[2 * tile] = chosen->reduce(t.p, t.dtypes.p(), offset, count, max);
      parts[2 * tile + 1] = chosen->reduce(t.g, t.dtypes.g(), offset, count, max);
    }
  };
  in_parallel(first[n], elements, run);
  for (int64_t i = 0; i < n; ++i) {
    for (int k = reads_p ? 0 : 1; k < 2; ++k) {
      double& sum = sums[2 * i + k] = 0;
      for (int64_t tile = first[i]; tile < first[i + 1]; ++tile)
        sum = max ? Largest::combine(sum, parts[2 * tile + k]) : Squares::combine(sum, parts[2 * tile + k]);
    }
  }
}

std::vector<std::string> cpu_variants() {
  std::vector<std::string> names;
  for (const Variant& variant : variants()) names.push_back(variant.name);
  return names;
}

void use_cpu_variant(const std::string& name) {
  const auto named = [&](const Variant& variant) { return variant.name == name; };
  const auto found = std::find_if(variants().begin(), variants().end(), named);
  if (found == variants().end() && name != nothing.name)
    throw std::invalid_argument("this processor cannot run the variant " + name);
  chosen = found == variants().end() ? &nothing : &*found;
}

}  // namespace texp
