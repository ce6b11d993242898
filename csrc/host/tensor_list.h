// The tensors that one step is going to change on one device: which of them a kernel can take, and what it is given.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <deque>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../cpu/kernels.h"
#include "../tables.h"

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

inline Dtype dtype_of(at::ScalarType type) {
  switch (type) {
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

// g, b: null if there is none.
inline Dtypes dtypes_of(const at::Tensor& p, const at::Tensor* g, const at::Tensor* b) {
  const auto of = [&](const at::Tensor* t) { return dtype_of((t == nullptr ? p : *t).scalar_type()); };
  return Dtypes::of(of(&p), of(g), of(b));
}

inline bool is_dense(const at::Tensor& t) { return t.is_contiguous() || t.is_non_overlapping_and_dense(); }

inline bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
  return is_dense(a) && is_dense(b);
}

// Why a kernel does not take a parameter.
struct Refusal {
  const char* who = nullptr;  // the parameter, its gradient or its buffer
  const char* why = nullptr;

  explicit operator bool() const { return why != nullptr; }
};

class TensorList {
 public:
  explicit TensorList(c10::Device device)
      : device_(device), is_cpu_(device.is_cpu()), plain_(is_cpu_ ? kPlainOnCpu : kPlainOnCuda) {}

  void* stream = nullptr;  // of a CUDA device, where the step is to be launched

  const c10::Device& device() const { return device_; }
  const TensorEntry* entries() const { return entries_.data(); }
  int64_t size() const { return static_cast<int64_t>(size_); }
  const Tiles& tiles() const { return tiles_; }

  // Another number whenever the entries are not, byte for byte, those of the step before; no two lists have the same.
  int64_t version() const { return version_; }

  // Begins a step. The entries of the last one stay where they are, to be compared with.
  void start() {
    drop();
    shared_.clear();
  }

  // Begins it again, without tensors that share memory if `finish` has found some.
  void drop() {
    size_ = 0;
    changed_ = moved_ = !is_checked_;
    written_back_.clear();
    copies_.clear();
    held_.clear();
    held_storages_.clear();
  }

  // Takes p, g and b (null: none) if they are what nearly all tensors are: of one dtype, plain and contiguous.
  [[gnu::flatten]] bool take_usual(const at::Tensor& p, const at::Tensor* g, const at::Tensor* b, int32_t row) {
    const auto impl = [](const at::Tensor* t) { return t == nullptr ? nullptr : t->unsafeGetTensorImpl(); };
    const Impls impls{p.unsafeGetTensorImpl(), impl(g), impl(b)};
    if (!is_usual(*impls.p) || !shared_.empty()) return false;
    const caffe2::TypeMeta type = impls.p->dtype();
    const at::IntArrayRef sizes = impls.p->sizes_default();
    const auto is_like_p = [&](const c10::TensorImpl* t) {
      return t == nullptr || (t->dtype() == type && is_usual(*t) && same(t->sizes_default(), sizes));
    };
    if (!is_like_p(impls.g) || !is_like_p(impls.b)) return false;
    const at::ScalarType scalar = c10::typeMetaToScalarType(type);
    if (scalar != at::kFloat && scalar != at::kBFloat16 && scalar != at::kHalf && scalar != at::kDouble) return false;
    const Dtype dtype = dtype_of(scalar);
    const int64_t numel = impls.p->numel_default();
    push(impls, mutable_data(impls.p, numel), data(impls.g, numel), mutable_data(impls.b, numel), numel, row,
         Dtypes::of(dtype, dtype, dtype));
    return true;
  }

  // Takes p, g and b (null: none) if a kernel can; otherwise says why not and takes nothing.
  Refusal take(const at::Tensor& p, const at::Tensor* g, const at::Tensor* b, int32_t row) {
    if (take_usual(p, g, b, row)) return {};
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
    const auto impl = [](const at::Tensor* t) { return t == nullptr ? nullptr : t->unsafeGetTensorImpl(); };
    const int64_t numel = p.numel();
    push({impl(&p), impl(g_flat), impl(b)}, mutable_data(impl(&p_flat), numel), data(impl(g_flat), numel),
         mutable_data(impl(b_flat), numel), numel, row, dtypes_of(p, g, b));
    return {};
  }

  // Takes out again those tensors of whose row `drops` says that it changes nothing.
  template <class F>
  void remove_if(const F& drops) {
    size_t kept = 0;
    for (size_t i = 0; i < size_; ++i) {
      if (drops(entries_[i].row)) continue;
      entries_[kept] = entries_[i];
      impls_[kept++] = impls_[i];
    }
    if (kept != size_) changed_ = moved_ = true;
    size_ = kept;
  }

  // Ends the gathering. Returns whether tensors that are written to share memory: threads would write there at once, in
  // no order. The list then refuses those, and has to be made again.
  bool finish() {
    if (size_ != last_size_) moved_ = true;
    last_size_ = size_;
    if (changed_ || moved_) version_ = ++versions_;
    if (moved_ || !copies_.empty()) {
      const uint64_t layout = fingerprint();
      uint64_t& known = known_layouts_[layout % known_layouts_.size()];
      if (known != layout || !copies_.empty()) {
        shared_ = overlapping();
        if (!shared_.empty()) return true;
        known = layout;
      }
      if (is_cpu_) tiles_.make(entries_.data(), size());
    }
    is_checked_ = true;
    return false;
  }

  // Whether the step is long enough to amortise releasing the GIL.
  bool releases_gil() const { return is_cpu_ && size_ != 0 && tiles_.elements > 1'000'000; }

  // Keeps tensors and their memory, which Python code that runs before or during the step may drop.
  void hold() {
    for (size_t i = 0; i < size_; ++i)
      for (c10::TensorImpl* impl : {impls_[i].p, impls_[i].g, impls_[i].b})
        if (impl != nullptr) held_.push_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(impl));
    hold_memory();
  }

  void hold_memory() {
    for (size_t i = 0; i < size_; ++i)
      for (const c10::TensorImpl* impl : {impls_[i].p, impls_[i].g, impls_[i].b})
        if (impl != nullptr) held_storages_.push_back(impl->storage());
  }

  // What remains to be done after the kernel.
  void write_back() {
    for (auto& [original, flat] : written_back_) original.copy_(flat);
  }

  void bump_versions() {
    for (size_t i = 0; i < size_; ++i) {
      impls_[i].p->bump_version();
      if (impls_[i].b != nullptr) impls_[i].b->bump_version();
    }
  }

 private:
  struct Impls {
    c10::TensorImpl *p, *g, *b;  // null: none
  };

  static constexpr c10::DispatchKeySet kPlainOnCpu{c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                                   c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU};
  static constexpr c10::DispatchKeySet kPlainOnCuda{c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView,
                                                    c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutocastCUDA};

  // What nearly all tensors are, told at little cost. Sizes of its own making come with other keys, so that what the
  // accessors named `default` return is true of it.
  bool is_usual(const c10::TensorImpl& t) const {
    return t.key_set() == plain_ && !t.has_symbolic_sizes_strides() &&
           t.is_contiguous_default(at::MemoryFormat::Contiguous) && (is_cpu_ || t.device() == device_);
  }

  static bool same(at::IntArrayRef a, at::IntArrayRef b) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); ++i)
      if (a[i] != b[i]) return false;
    return true;
  }

  void push(const Impls& impls, void* p, const void* g, void* b, int64_t numel, int32_t row, Dtypes dtypes) {
    if (size_ == entries_.size()) {
      entries_.emplace_back();
      impls_.emplace_back();
    }
    TensorEntry& entry = entries_[size_];
    if (entry.p != p || entry.b != b || entry.numel != numel || entry.dtypes != dtypes) {
      moved_ = true;
      entry.p = p;
      entry.b = b;
      entry.numel = numel;
      entry.dtypes = dtypes;
    }
    if (entry.g != g || entry.row != row) {
      changed_ = true;
      entry.g = g;
      entry.row = row;
    }
    impls_[size_++] = impls;
    is_checked_ = false;
  }

  // As those of a tensor, whose checks a strided one passes. Null where there is none, or no elements.
  static const void* data(const c10::TensorImpl* t, int64_t numel) {
    return t == nullptr || numel == 0 ? nullptr : at_offset(t, const_cast<void*>(t->unsafe_storage().data()));
  }

  static void* mutable_data(const c10::TensorImpl* t, int64_t numel) {
    return t == nullptr || numel == 0 ? nullptr : at_offset(t, t->unsafe_storage().mutable_data());
  }

  static void* at_offset(const c10::TensorImpl* t, void* begin) {
    const int64_t offset = t->storage_offset_default();
    return offset == 0 ? begin : static_cast<char*>(begin) + offset * static_cast<int64_t>(t->itemsize());
  }

  // A dense copy, with these strides.
  const at::Tensor& copied(const at::Tensor& t, at::IntArrayRef strides, bool write_back) {
    copies_.push_back(at::empty_strided(t.sizes(), strides, t.options()).copy_(t));
    if (write_back) written_back_.emplace_back(t, copies_.back());
    return copies_.back();
  }

  // Says where in memory the step writes, unless by a collision of 64 bits.
  uint64_t fingerprint() const {
    uint64_t hash = size_;
    for (size_t i = 0; i < size_; ++i) {
      const TensorEntry& entry = entries_[i];
      const uint64_t sizes = static_cast<uint64_t>(entry.numel) * 64 + entry.dtypes.bits;
      uint64_t mixed = reinterpret_cast<uintptr_t>(entry.p) * 0x9e3779b97f4a7c15 ^
                       reinterpret_cast<uintptr_t>(entry.b) * 0xc2b2ae3d27d4eb4f ^ sizes * 0x165667b19e3779f9;
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
    for (size_t i = 0; i < size_; ++i) {
      for (const c10::TensorImpl* t : {impls_[i].p, impls_[i].b}) {
        if (t == nullptr || t->numel() == 0) continue;
        int64_t last = 0;
        for (int64_t dim = 0; dim < t->dim(); ++dim) last += (t->sizes()[dim] - 1) * t->strides()[dim];
        const char* begin = static_cast<const char*>(t->data());
        spans.push_back({begin, begin + (last + 1) * static_cast<int64_t>(t->itemsize()), t});
      }
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

  const c10::Device device_;
  const bool is_cpu_;
  const c10::DispatchKeySet plain_;
  std::vector<TensorEntry> entries_;  // beyond size_: those of the step before
  std::vector<Impls> impls_;
  size_t size_ = 0, last_size_ = 0;
  bool changed_ = true;  // whether some entry differs from that of the step before
  bool moved_ = true;    // whether one is in other memory
  bool is_checked_ = false;  // whether the entries are those of a step whose memory was found not to be shared
  int64_t version_ = 0;
  static inline std::atomic<int64_t> versions_ = 0;  // how many there are of all lists: launchers know them by number
  Tiles tiles_;                    // on the CPU
  std::deque<at::Tensor> copies_;  // a deque, so that references stay valid
  std::vector<std::pair<at::Tensor, at::Tensor>> written_back_;
  std::vector<c10::intrusive_ptr<c10::TensorImpl>> held_;
  std::vector<c10::Storage> held_storages_;
  std::unordered_set<const c10::TensorImpl*> shared_;  // tensors that are not taken
  std::array<uint64_t, 64> known_layouts_{};           // fingerprints of memory that is not shared
};

}  // namespace texp
