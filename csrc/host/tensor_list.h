// Which tensors the kernel can take, and what one step is going to do to them.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>
#include <array>
#include <deque>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../cpu/kernels.h"

namespace texp {

// Why no kernel can take a tensor, or null.
inline const char* unsupported(const at::Tensor& t) {
  if (!t.device().is_cpu() && !t.device().is_cuda()) return "is neither on the CPU nor on a CUDA device";
  if (t.layout() != at::kStrided) return "is not strided (sparse, say)";
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

// The same for one that is written to.
inline const char* unwritable(const at::Tensor& t) {
  if (const char* reason = unsupported(t)) return reason;
  if (t.is_inference()) return "is an inference tensor";
  if (at::has_internal_overlap(t) == at::MemOverlap::Yes) return "holds several elements in one place (expanded)";
  return nullptr;
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

// Whether the arithmetic is in float64; g, b: null if there is none.
inline bool is_wide(const at::Tensor& p, const at::Tensor* g, const at::Tensor* b) {
  return is_wide(dtype_of(p), g == nullptr ? dtype_of(p) : dtype_of(*g), b == nullptr ? dtype_of(p) : dtype_of(*b));
}

inline bool is_dense(const at::Tensor& t) { return t.is_contiguous() || t.is_non_overlapping_and_dense(); }

inline bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
  return is_dense(a) && is_dense(b);
}

// Why the kernel does not take a parameter.
struct Refusal {
  const char* who = nullptr;  // the parameter, its gradient or its buffer
  const char* why = nullptr;

  explicit operator bool() const { return why != nullptr; }
};

constexpr int32_t kUnknownRow = -1;

// What one step is going to do on one device, gathered before any of it is done.
class Plan {
 public:
  Plan(const Rows& rows, c10::Device device)
      : rows_(rows), device_(device), plain_(device.is_cpu() ? kPlainOnCpu : kPlainOnCuda) {}

  const c10::Device& device() const { return device_; }
  const std::vector<Item>& items() const { return items_; }

  void clear() {
    forget_items();
    shared_.clear();
  }

  // The memory of the last step serves the next one.
  void forget_items() {
    items_.clear();
    read_.clear();
    written_.clear();
    written_back_.clear();
    copies_.clear();
    held_.clear();
    held_storages_.clear();
    elements_ = 0;
  }

  // Takes p, g and b (null: none) if they are what nearly all tensors are: float32, plain and contiguous.
  bool take_usual(const at::Tensor& p, const at::Tensor* g, const at::Tensor* b, int32_t row) {
    if (row != kUnknownRow && !rows_.fits(row, false)) [[unlikely]]
      return false;
    if (!(usual(p) && (g == nullptr || usual(*g, p)) && (b == nullptr || usual(*b, p)) && shared_.empty())) return false;
    push(p, p, g, b, b, row, Dtype::float32, Dtype::float32, Dtype::float32);
    return true;
  }

  // Takes p, g and b (null: none) if the kernel can; otherwise says why not and takes nothing. `row`: which of the rows,
  // or kUnknownRow.
  Refusal take(const at::Tensor& p, const at::Tensor* g, const at::Tensor* b, int32_t row) {
    if (take_usual(p, g, b, row)) return {};
    if (row != kUnknownRow && !rows_.fits(row, is_wide(p, g, b)))
      return {"the parameter", "is too narrow for a step as large as this"};
    if (const char* why = unwritable(p)) return {"the parameter", why};
    if (g != nullptr) {
      if (const char* why = unsupported(*g)) return {"its gradient", why};
      if (g->device() != p.device()) return {"its gradient", "is on another device"};
      if (g->sizes() != p.sizes()) return {"its gradient", "has another shape"};
    }
    if (b != nullptr) {
      if (const char* why = unwritable(*b)) return {"its momentum buffer", why};
      if (b->device() != p.device()) return {"its momentum buffer", "is on another device"};
      if (b->sizes() != p.sizes()) return {"its momentum buffer", "has another shape"};
    }
    if (shared_.count(p.unsafeGetTensorImpl()) != 0 || (b != nullptr && shared_.count(b->unsafeGetTensorImpl()) != 0))
      return {"the parameter", "or its buffer lies in memory that another tensor of this step lies in, too"};
    const at::Tensor& p_flat = is_dense(p) ? p : copied(p, at::empty_like(p).strides(), true);
    const at::Tensor* g_flat = g == nullptr || same_layout(p_flat, *g) ? g : &copied(*g, p_flat.strides(), false);
    const at::Tensor* b_flat = b == nullptr || same_layout(p_flat, *b) ? b : &copied(*b, p_flat.strides(), true);
    const Dtype own = dtype_of(p);
    push(p, p_flat, g_flat, b, b_flat, row, own, g == nullptr ? own : dtype_of(*g), b == nullptr ? own : dtype_of(*b));
    return {};
  }

  // Whether tensors that are written to share memory: threads would write there at once, in no order. The plan then
  // refuses those tensors until it is cleared, and has to be made anew.
  bool has_shared_memory() {
    const uint64_t layout = fingerprint();
    uint64_t& known = known_layouts_[layout % known_layouts_.size()];
    if (known == layout && copies_.empty()) return false;
    shared_ = overlapping();
    if (!shared_.empty()) return true;
    known = layout;
    return false;
  }

  // Letting other threads have the interpreter pays for steps that take longer than the handing over.
  bool lends_interpreter() const { return device_.is_cpu() && elements_ > 1'000'000; }

  // Keeps tensors and their memory, which Python code that runs before or during the step may drop.
  void hold() {
    const auto hold_all = [&](const std::vector<c10::TensorImpl*>& impls) {
      for (c10::TensorImpl* impl : impls) {
        held_.push_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(impl));
        held_storages_.push_back(impl->storage());
      }
    };
    hold_all(read_);
    hold_all(written_);
  }

  void run() {
    step_cpu(items_, rows_);
    write_back();
  }

  // What remains to be done after the kernel.
  void write_back() {
    for (auto& [original, flat] : written_back_) original.copy_(flat);
  }

  void bump_versions() {
    for (c10::TensorImpl* impl : written_) impl->bump_version();
  }

 private:
  static constexpr c10::DispatchKeySet kPlainOnCpu{c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                                   c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU};
  static constexpr c10::DispatchKeySet kPlainOnCuda{c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView,
                                                    c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutocastCUDA};

  // What nearly all tensors are, told at little cost.
  bool usual(const at::Tensor& t) const {
    return t.key_set() == plain_ && t.scalar_type() == at::kFloat && t.is_contiguous() &&
           (device_.is_cpu() || t.device() == device_);
  }
  bool usual(const at::Tensor& t, const at::Tensor& p) const { return usual(t) && t.sizes() == p.sizes(); }

  void push(const at::Tensor& p, const at::Tensor& p_flat, const at::Tensor* g_flat, const at::Tensor* b,
            const at::Tensor* b_flat, int32_t row, Dtype dtype, Dtype g_dtype, Dtype b_dtype) {
    items_.push_back({
        .p = p_flat.mutable_data_ptr(),
        .g = g_flat == nullptr ? nullptr : g_flat->const_data_ptr(),
        .b = b_flat == nullptr ? nullptr : b_flat->mutable_data_ptr(),
        .numel = p.numel(),
        .row = row,
        .dtype = dtype,
        .g_dtype = g_dtype,
        .b_dtype = b_dtype,
    });
    if (g_flat != nullptr) read_.push_back(g_flat->unsafeGetTensorImpl());
    written_.push_back(p.unsafeGetTensorImpl());
    if (b != nullptr) written_.push_back(b->unsafeGetTensorImpl());
    elements_ += p.numel();
  }

  // A dense copy, with these strides.
  const at::Tensor& copied(const at::Tensor& t, at::IntArrayRef strides, bool write_back) {
    copies_.push_back(at::empty_strided(t.sizes(), strides, t.options()).copy_(t));
    if (write_back) written_back_.emplace_back(t, copies_.back());
    return copies_.back();
  }

  // Says where in memory the step writes, unless by a collision of 64 bits.
  uint64_t fingerprint() const {
    uint64_t hash = items_.size();
    for (const Item& item : items_) {
      const uint64_t sizes = static_cast<uint64_t>(item.numel) * 16 + static_cast<uint64_t>(item.dtype) * 4 +
                             static_cast<uint64_t>(item.b_dtype);
      uint64_t mixed = reinterpret_cast<uintptr_t>(item.p) * 0x9e3779b97f4a7c15 ^
                       reinterpret_cast<uintptr_t>(item.b) * 0xc2b2ae3d27d4eb4f ^ sizes * 0x165667b19e3779f9;
      mixed ^= mixed >> 32;
      hash = hash * 0xd6e8feb86659fd93 + mixed;
    }
    return hash;
  }

  // Those tensors that are written to whose memory, from the first to the last element, is not theirs alone.
  std::unordered_set<const c10::TensorImpl*> overlapping() const {
    struct Span {
      const char *begin, *end;
      const c10::TensorImpl* tensor;
    };
    std::vector<Span> spans;
    for (const c10::TensorImpl* t : written_) {
      if (t->numel() == 0) continue;
      int64_t last = 0;
      for (int64_t i = 0; i < t->dim(); ++i) last += (t->sizes()[i] - 1) * t->strides()[i];
      const char* begin = static_cast<const char*>(t->data());
      spans.push_back({begin, begin + (last + 1) * static_cast<int64_t>(t->itemsize()), t});
    }
    std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    std::unordered_set<const c10::TensorImpl*> shared;
    const Span* furthest = nullptr;  // of those before, that which ends last
    for (const Span& span : spans) {
      if (furthest != nullptr && span.begin < furthest->end) shared.insert({span.tensor, furthest->tensor});
      if (furthest == nullptr || span.end > furthest->end) furthest = &span;
    }
    return shared;
  }

  const Rows& rows_;
  const c10::Device device_;
  const c10::DispatchKeySet plain_;
  std::vector<Item> items_;
  std::vector<c10::TensorImpl*> read_, written_;
  std::deque<at::Tensor> copies_;  // a deque, so that references stay valid
  std::vector<std::pair<at::Tensor, at::Tensor>> written_back_;
  std::vector<c10::intrusive_ptr<c10::TensorImpl>> held_;
  std::vector<c10::Storage> held_storages_;
  std::unordered_set<const c10::TensorImpl*> shared_;  // tensors that are not taken
  std::array<uint64_t, 64> known_layouts_{};           // fingerprints of memory that is not shared
  int64_t elements_ = 0;
};

}  // namespace texp
