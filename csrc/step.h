// What a step is given, on any device: tensors as pointers, and the rows that apply to them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "row.h"

namespace texp {

enum class Dtype : uint8_t { float32, float64, bfloat16, float16 };

// One tensor, dense, p, g and b in the same order of elements.
struct Item {
  void* p;        // modified in place
  const void* g;  // read; null: 0
  void* b;        // modified in place; null: 0, not written
  int64_t numel;
  int32_t row;    // index into the rows of the step
  Dtype dtype;    // of p and g
  Dtype b_dtype;  // that of p, or float32
};

// Arithmetic is in float32, in float64 for float64 tensors.
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

  bool fits(int32_t row, Dtype dtype) const {
    return dtype == Dtype::float64 ? wide_is_finite[row] : narrow_is_finite[row];
  }

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
