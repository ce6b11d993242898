// The kernels for tensors in the memory of the host.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../math/row.h"
#include "../tables.h"

namespace texp {

// Of each row both versions: for arithmetic in float32 and in float64.
struct Rows {
  std::vector<Row<float>> narrow;
  std::vector<Row<double>> wide;

  int32_t add() {
    wide.emplace_back();
    narrow.emplace_back();
    return static_cast<int32_t>(wide.size()) - 1;
  }

  void set(int32_t row, const Row<double>& values) {
    wide[row] = values;
    narrow[row] = values.to<float>();
  }

  bool fits(int32_t row, bool is_wide) const {
    return narrow[row].is_finite() || (is_wide && wide[row].is_finite());
  }

  void clear() {
    narrow.clear();
    wide.clear();
  }
};

// How many elements the tensors have, and how many tiles stand before each of them and before the end.
struct Tiles {
  std::vector<int64_t> first;
  int64_t elements = 0;

  void make(const TensorEntry* tensors, int64_t n);
};

namespace cpu {

// Applies to each tensor its row, in one pass over one index space, split over torch's threads.
void apply(const TensorEntry* tensors, int64_t n, const Tiles& tiles, const Rows& rows);

// Writes ‖p‖² and ‖g‖² of each tensor, or max |g|, to sums[2·i] and sums[2·i + 1]: the same bits whatever the number of
// threads. Of a reduction that does not read p, sums[2·i] is left as it is.
void reduce(const TensorEntry* tensors, int64_t n, Reduction reduction, double* sums);

}  // namespace cpu

// The instruction sets it was compiled for that this processor has, the best first, which is used unless another is
// asked for. All give the same bits. "nothing" leaves tensors as they are, for benchmarks of the host.
std::vector<std::string> cpu_variants();
void use_cpu_variant(const std::string& name);

}  // namespace texp
