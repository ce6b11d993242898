// What a step is given, on any device: tensors as pointers, and the rows that apply to them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../math/row.h"

namespace texp {

enum class Dtype : uint8_t { float32, float64, bfloat16, float16 };

// One tensor, dense, p, g and b in the same order of elements.
struct Item {
  void* p;        // modified in place
  const void* g;  // read; null: 0
  void* b;        // modified in place; null: 0, not written
  int64_t numel;
  int32_t row;    // index into the rows of the step
  Dtype dtype;    // of p
  Dtype g_dtype;  // of g, and where there is none that of p, so that there are fewer mixes
  Dtype b_dtype;  // of b, and likewise
};

// Whether the arithmetic is in float64: it is where p, g or b is, and otherwise in float32. Each element is converted to
// that, and p and b are rounded once to their own dtypes: from float64 to bf16 and fp16 by way of float32, as torch does.
TEXP_INLINE bool is_wide(Dtype p, Dtype g, Dtype b) {
  return p == Dtype::float64 || g == Dtype::float64 || b == Dtype::float64;
}

// Whether the kernels have a loop for just these dtypes. Other mixes are converted to the type of the arithmetic first.
TEXP_INLINE bool is_usual(Dtype p, Dtype g, Dtype b) {
  return g == p && (b == p || (b == Dtype::float32 && p != Dtype::float64));
}

// Of each row both versions: for arithmetic in float32 and in float64.
struct Rows {
  std::vector<Row<float>> narrow;
  std::vector<Row<double>> wide;
  std::vector<char> narrow_is_finite, wide_is_finite;

  int32_t add(const Row<double>& row) {
    narrow.push_back(row.to<float>());
    wide.push_back(row);
    narrow_is_finite.push_back(narrow.back().is_finite());
    wide_is_finite.push_back(wide.back().is_finite());
    return static_cast<int32_t>(wide.size()) - 1;
  }

  bool fits(int32_t row, bool in_float64) const { return narrow_is_finite[row] || (in_float64 && wide_is_finite[row]); }

  void clear() {
    narrow.clear();
    wide.clear();
    narrow_is_finite.clear();
    wide_is_finite.clear();
  }
};

// Applies to each item its row, in one pass over one index space, split over torch's threads.
void step_cpu(const std::vector<Item>& items, const Rows& rows);

// The instruction sets it was compiled for that this processor has, the best first, which is used unless another is
// asked for. All give the same bits.
std::vector<std::string> cpu_variants();
void use_cpu_variant(const std::string& name);

}  // namespace texp
