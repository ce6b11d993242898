// Which tensors the kernel can take, and what one step is going to do to them.
#pragma once

#include <ATen/NativeFunctions.h>
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <deque>
#include <utility>
#include <vector>

#include "step.h"

namespace texp {

namespace py = pybind11;

// Why the kernel cannot take a tensor, or null.
inline const char* unsupported(const at::Tensor& t) {
  if (!t.device().is_cpu()) return "is not on the CPU";
  if (t.layout() != at::kStrided) return "is sparse";
  constexpr c10::DispatchKeySet lazy{c10::DispatchKey::Python, c10::DispatchKey::Negative, c10::DispatchKey::Conjugate,
                                     c10::DispatchKey::ZeroTensor};
  if (t.key_set().has_any(lazy)) return "is a subclass or a lazy view of a tensor";
  switch (t.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kHalf:
      return nullptr;
    default:
      return "is not float32, float64, bfloat16 or float16";
  }
}

inline Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return Dtype::float64;
    case at::kBFloat16:
      return Dtype::bfloat16;
    case at::kHalf:
      return Dtype::float16;
    default:
      return Dtype::float32;
  }
}

inline bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
  return a.is_non_overlapping_and_dense() && b.is_non_overlapping_and_dense();
}

// What one step is going to do, gathered before any of it is done.
class Plan {
 public:
  // The memory of the last step serves the next one.
  void clear() {
    rows_.narrow.clear();
    rows_.wide.clear();
    items_.clear();
    read_.clear();
    written_.clear();
    written_back_.clear();
    copies_.clear();
    elements_ = 0;
  }

  int32_t add_row(const Row<double>& row) { return rows_.add(row); }

  // Takes p, g and b (null: none) if the kernel can; otherwise returns the reason and takes nothing.
  const char* take(const at::Tensor& p, const at::Tensor* g, const at::Tensor* b, int32_t row) {
    if (usual(p) && (g == nullptr || usual(*g, p)) && (b == nullptr || usual(*b, p))) {
      push(p, p, g, b, b, row);
      return nullptr;
    }
    if (const char* reason = unsupported(p)) return reason;
    if (g != nullptr) {
      if (const char* reason = unsupported(*g)) return reason;
      if (g->scalar_type() != p.scalar_type()) return "has another dtype than its gradient";
      if (g->sizes() != p.sizes()) return "has another shape than its gradient";
    }
    if (b != nullptr) {
      if (const char* reason = unsupported(*b)) return reason;
      const bool narrow = p.scalar_type() != at::kDouble;
      if (b->scalar_type() != p.scalar_type() && !(narrow && b->scalar_type() == at::kFloat))
        return "has a momentum buffer that is neither of its dtype nor float32";
      if (b->sizes() != p.sizes()) return "has another shape than its momentum buffer";
    }
    const bool dense = p.is_contiguous() || p.is_non_overlapping_and_dense();
    const at::Tensor& p_flat = dense ? p : flattened(p, p, true);
    const at::Tensor* g_flat = g == nullptr || same_layout(p_flat, *g) ? g : &flattened(*g, p_flat, false);
    const at::Tensor* b_flat = b == nullptr || same_layout(p_flat, *b) ? b : &flattened(*b, p_flat, true);
    push(p, p_flat, g_flat, b, b_flat, row);
    return nullptr;
  }

  // Letting other threads have the interpreter pays for steps that take longer than the handing over.
  bool lends_interpreter() const { return elements_ > 1'000'000; }

  void run() {
    if (lends_interpreter()) {
      // Other threads may drop tensors, such as gradients, which are therefore held.
      std::vector<c10::intrusive_ptr<c10::TensorImpl>> held;
      held.reserve(read_.size() + written_.size());
      for (const auto& impls : {read_, written_})
        for (c10::TensorImpl* impl : impls) held.push_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(impl));
      const py::gil_scoped_release release;
      step_cpu(items_, rows_);
    } else {
      step_cpu(items_, rows_);
    }
    for (auto& [original, flat] : written_back_) original.copy_(flat);
    for (c10::TensorImpl* impl : written_)
      if (!impl->is_inference()) impl->bump_version();
  }

 private:
  // Whether t is as most tensors are, so that nothing else needs to be asked: on the CPU, strided, contiguous, float32.
  static bool usual(const at::Tensor& t) {
    static const uint64_t plain = at::empty({0}).key_set().raw_repr();
    return t.key_set().raw_repr() == plain && t.scalar_type() == at::kFloat && t.is_contiguous();
  }
  static bool usual(const at::Tensor& t, const at::Tensor& p) { return usual(t) && t.sizes() == p.sizes(); }

  void push(const at::Tensor& p, const at::Tensor& p_flat, const at::Tensor* g_flat, const at::Tensor* b,
            const at::Tensor* b_flat, int32_t row) {
    items_.push_back({
        .p = p_flat.mutable_data_ptr(),
        .g = g_flat == nullptr ? nullptr : g_flat->const_data_ptr(),
        .b = b_flat == nullptr ? nullptr : b_flat->mutable_data_ptr(),
        .numel = p.numel(),
        .row = row,
        .dtype = dtype_of(p),
        .b_dtype = b == nullptr ? dtype_of(p) : dtype_of(*b),
    });
    if (g_flat != nullptr) read_.push_back(g_flat->unsafeGetTensorImpl());
    written_.push_back(p.unsafeGetTensorImpl());
    if (b != nullptr) written_.push_back(b->unsafeGetTensorImpl());
    elements_ += p.numel();
  }

  // A copy in the order of elements of `like`, or row-major where that has gaps.
  const at::Tensor& flattened(const at::Tensor& t, const at::Tensor& like, bool write_back) {
    const bool dense = like.is_non_overlapping_and_dense();
    at::Tensor flat = dense ? at::empty_strided(like.sizes(), like.strides(), t.options())
                            : at::empty(like.sizes(), t.options());
    flat.copy_(t);
    copies_.push_back(flat);
    if (write_back) written_back_.emplace_back(t, flat);
    return copies_.back();
  }

  Rows rows_;
  std::vector<Item> items_;
  std::vector<c10::TensorImpl*> read_, written_;
  std::deque<at::Tensor> copies_;  // a deque, so that references stay valid
  std::vector<std::pair<at::Tensor, at::Tensor>> written_back_;
  int64_t elements_ = 0;
};

}  // namespace texp
