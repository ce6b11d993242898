// One flattened index space over all tensors of a step: tile → (tensor, offset). CPU threads and CUDA blocks use the
// same mapping, with tiles of their own size. Sizes are 64-bit; empty tensors have no tiles.
#pragma once

#include <cstdint>

#include "row.h"

namespace texp {

TEXP_INLINE int64_t tiles_of(int64_t numel, int64_t tile) { return numel / tile + (numel % tile != 0); }

// The tensor of a tile. first[i] is the number of tiles before tensor i, for i = 0 … n; 0 ≤ tile < first[n].
template <class Index>
TEXP_INLINE Index tensor_of(Index tile, const Index* first, Index n) {
  Index low = 0, high = n;  // first[low] ≤ tile < first[high]
  while (high - low > 1) {
    const Index middle = low + (high - low) / 2;
    if (first[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace texp
