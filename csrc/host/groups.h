// Reading what stands in parameter groups and in optimizer.state.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/ScalarType.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../math/scale.h"

namespace texp {

namespace py = pybind11;

// The keys of a group that a step reads.
enum class Key : uint8_t {
  params,
  lr,
  momentum,
  dampening,
  weight_decay,
  nesterov,
  maximize,
  scale_invariant,
  trust_coeff,  // LARS; the next three only beside it
  eps,
  trust_clip,
  always_adapt,
  scale,
  scale_exponent,
  carried_decay,
  norm_stats,
  swa_lr,
  started,
  other,  // any that it does not read
};

constexpr int kKeys = static_cast<int>(Key::other);

inline PyObject* name(Key key) {
  static PyObject* const names[kKeys] = {
#define TEXP_NAME(name) PyUnicode_InternFromString(#name)
      TEXP_NAME(params),          TEXP_NAME(lr),       TEXP_NAME(momentum),        TEXP_NAME(dampening),
      TEXP_NAME(weight_decay),    TEXP_NAME(nesterov), TEXP_NAME(maximize),        TEXP_NAME(scale_invariant),
      TEXP_NAME(trust_coeff),     TEXP_NAME(eps),      TEXP_NAME(trust_clip),      TEXP_NAME(always_adapt),
      TEXP_NAME(scale),           TEXP_NAME(scale_exponent), TEXP_NAME(carried_decay), TEXP_NAME(norm_stats),
      TEXP_NAME(swa_lr),          TEXP_NAME(started),
#undef TEXP_NAME
  };
  return names[static_cast<int>(key)];
}

inline PyObject* momentum_buffer() {
  static PyObject* const name = PyUnicode_InternFromString("momentum_buffer");
  return name;
}

inline PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);  // borrowed
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline void set(PyObject* dict, PyObject* key, const py::object& value) {
  if (PyDict_SetItem(dict, key, value.ptr()) != 0) throw py::error_already_set();
}

inline py::tuple as_tuple(const Row<double>& r) {
  return py::make_tuple(r.a_b, r.a_g, r.a_p, r.c_u, r.c_g, r.c_p, r.s_p, r.e, r.r_u, r.r_d);
}

inline Row<double> as_row(const py::tuple& t) {
  const auto at = [&](size_t i) { return t[i].cast<double>(); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9)};
}

// What stands in a group, borrowed; null: the key is not there.
struct Options {
  PyObject* group = nullptr;
  PyObject* values[kKeys + 1] = {};

  PyObject* operator[](Key key) const { return values[static_cast<int>(key)]; }

  PyObject* required(Key key) const {
    if ((*this)[key] == nullptr) throw py::key_error(PyUnicode_AsUTF8(name(key)));
    return (*this)[key];
  }
};

// A dict's version: CPython before 3.13 gives it a new one, that no other dict has had, whenever it comes to hold another
// key or value. With the same version it holds the very objects that it held, and keeps them alive. 0: there is none.
inline uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030D0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  return 0;
#endif
}

// Reads the options of a group in one pass. Nearly all groups have the same keys in the same order, so that which key
// stands where is remembered from the group before.
class OptionsReader {
 public:
  const Options& read(PyObject* group, size_t index) {
    while (known_.size() <= index) known_.emplace_back();
    auto& [version, options] = known_[index];
    if (options.group == group && version != 0 && version == version_of(group)) return options;
    version = 0;  // should what follows throw
    options = {.group = group};
    PyObject *key, *value;
    Py_ssize_t position = 0;
    for (size_t i = 0; PyDict_Next(group, &position, &key, &value); ++i) {
      if (i == order_.size()) order_.emplace_back();
      if (order_[i].first.ptr() != key) order_[i] = {py::reinterpret_borrow<py::object>(key), key_of(key)};
      options.values[static_cast<int>(order_[i].second)] = value;
    }
    version = version_of(group);
    return options;
  }

 private:
  static Key key_of(PyObject* key) {
    for (int i = 0; i < kKeys; ++i)
      if (name(Key(i)) == key || (PyUnicode_CheckExact(key) && PyUnicode_Compare(name(Key(i)), key) == 0)) return Key(i);
    return Key::other;
  }

  std::vector<std::pair<py::object, Key>> order_;
  std::deque<std::pair<uint64_t, Options>> known_;  // by group, with its version; a deque, so that references stay valid
};

// Overwrites a float that nobody but its dict holds, which costs far less than to make and to set another; false where
// it cannot be done.
inline bool overwrite(PyObject* value, double number) {
#ifdef Py_GIL_DISABLED
  return false;
#else
  if (Py_REFCNT(value) != 1 || !PyFloat_CheckExact(value)) return false;
  reinterpret_cast<PyFloatObject*>(value)->ob_fval = number;
  return true;
#endif
}

// The scale of a group as its dict holds it, borrowed. Null: what Scale{} has, as in an ordinary group.
struct StoredScale {
  PyObject *group, *P, *exponent, *kappa;
  uint64_t version;  // of the group

  explicit StoredScale(const Options& options)
      : group(options.group),
        P(options[Key::scale]),
        exponent(P == nullptr ? nullptr : options[Key::scale_exponent]),
        kappa(P == nullptr ? nullptr : options[Key::carried_decay]),
        version(version_of(group)) {}

  // is_unchanged: no Python code has run since it was read.
  void write(const Scale& before, const Scale& after, bool is_unchanged) const {
    const bool fresh = is_unchanged || (version != 0 && version == version_of(group));
    const bool whole = P != nullptr && exponent != nullptr && kappa != nullptr;
    if (!whole || (after.P != before.P && !(fresh && overwrite(P, after.P))))
      set(group, name(Key::scale), py::float_(after.P));
    if (!whole || after.exponent != before.exponent) set(group, name(Key::scale_exponent), py::int_(after.exponent));
    if (!whole || (after.kappa != before.kappa && !(fresh && overwrite(kappa, after.kappa))))
      set(group, name(Key::carried_decay), py::float_(after.kappa));
  }
};

// optimizer.state[param], which makes what is missing.
inline py::object values_of(const py::dict& state, py::handle param) {
  py::object values = state[param];
  if (!PyDict_Check(values.ptr())) throw py::type_error("optimizer.state must hold a dict for each parameter");
  return values;
}

inline void drop_if_empty(const py::dict& state, py::handle param) {
  PyObject* values = PyDict_GetItemWithError(state.ptr(), param.ptr());
  if (values != nullptr && PyDict_Check(values) && PyDict_GET_SIZE(values) == 0) PyDict_DelItem(state.ptr(), param.ptr());
  PyErr_Clear();
}

// What momentum_dtype was asked for, if any.
using MomentumDtype = std::optional<at::ScalarType>;

// A buffer of zeros, for a tensor's first step.
inline at::Tensor new_buffer(const at::Tensor& p, const at::Tensor& g, const MomentumDtype& asked) {
  const at::ScalarType dtype = asked.value_or(c10::promoteTypes(p.scalar_type(), g.scalar_type()));
  const c10::InferenceMode normal(false);  // for later steps outside of it
  return at::zeros_like(p, p.options().dtype(dtype));
}

// The dtype that a buffer is to be widened to; that which it has: it is as wide as it is to be.
inline at::ScalarType wide_enough(const at::Tensor& p, const at::Tensor& b, const MomentumDtype& asked) {
  const at::ScalarType is = b.scalar_type();
  return at::isFloatingType(is) ? c10::promoteTypes(is, asked.value_or(p.scalar_type())) : is;
}

inline at::Tensor widened(const at::Tensor& b, at::ScalarType dtype) {
  const c10::InferenceMode normal(false);
  return b.to(dtype);
}

struct Param {
  PyObject* object = nullptr;
  bool exact = false;                // a torch.Tensor or Parameter
  const at::Tensor* grad = nullptr;  // null: none, or of a subclass
  PyObject* foreign_grad = nullptr;  // of a subclass; null: none
  PyObject* buf = nullptr;           // null: none

  bool has_grad() const { return grad != nullptr || foreign_grad != nullptr; }
};

// Thrown where reading on could run Python code: everything is to be read again, on the slow path.
struct NeedsSlowPath {};

// Where options are floats, ints, bools and tensors, and parameters are torch.Tensor or Parameter, reading them runs no
// Python code: what was read cannot change or vanish meanwhile, and is borrowed. A reader that is not on the slow path
// throws NeedsSlowPath where anything else stands; on the slow path it reads everything and holds all that it reads.
class Reader {
 public:
  bool slow_path = false;

  // check_scale: called with the number of a group and the group; raises where its scale is wrong.
  explicit Reader(py::object check_scale) : check_scale_(std::move(check_scale)) {}

  // state: optimizer.state
  void start(PyObject* state, bool on_slow_path) {
#if PY_VERSION_HEX < 0x030E0000
    slow_path = on_slow_path;
#else
    slow_path = true;  // to look a tensor up in a dict runs Python code
#endif
    if (state_ != state || state_version_ == 0 || state_version_ != version_of(state)) buffers_.clear();
    state_ = state;
    state_version_ = version_of(state);
    state_position_ = 0;
    next_buffer_ = 0;
    before_ = nullptr;
    drop();
  }

  // Lets go of what is held.
  void drop() {
    held_.clear();
    held_grads_.clear();
  }

  TEXP_INLINE PyObject* hold(PyObject* object) {
    if (slow_path) [[unlikely]]
      held_.push_back(py::reinterpret_borrow<py::object>(object));
    return object;
  }

  const Options& options(PyObject* group, Py_ssize_t index) {
    if (!PyDict_Check(group)) throw py::type_error("a parameter group must be a dict");
    const Options& options = options_.read(hold(group), static_cast<size_t>(index));
    if (slow_path)
      for (PyObject* value : options.values) hold(value);
    return options;
  }

  // The parameters of a group.
  std::span<PyObject*> params(const Options& options) {
    PyObject* list = options.required(Key::params);
    if (!PyList_Check(list) && !PyTuple_Check(list)) throw py::type_error("group['params'] must be a list");
    // Python code may shorten a list, so that its items are borrowed only where none runs.
    if (slow_path) list = held_.emplace_back(py::reinterpret_steal<py::object>(PySequence_Tuple(list))).ptr();
    return {PySequence_Fast_ITEMS(list), static_cast<size_t>(PySequence_Fast_GET_SIZE(list))};
  }

  double number(PyObject* value) const {
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    // Whether something is a tensor is a question that takes torch long to answer.
    if (!PyLong_CheckExact(value)) {
      if (THPVariable_CheckExact(value)) return THPVariable_Unpack(value).item().toDouble();
      if (!slow_path) throw NeedsSlowPath{};
      if (THPVariable_Check(value)) return THPVariable_Unpack(value).item().toDouble();
    }
    const double converted = PyFloat_AsDouble(value);
    if (converted == -1 && PyErr_Occurred()) throw py::error_already_set();
    return converted;
  }

  // Null: false.
  bool flag(PyObject* value) const {
    if (value == Py_True || value == Py_False || value == Py_None || value == nullptr) return value == Py_True;
    if (!slow_path) throw NeedsSlowPath{};
    const int truth = PyObject_IsTrue(value);
    if (truth < 0) throw py::error_already_set();
    return truth != 0;
  }

  // Whether the hyperparameters are the very objects of the group that was read before, which is still there.
  bool is_as_before(const Options& options) const {
    const auto first = [](const Options& of) { return &of.values[static_cast<int>(Key::lr)]; };
    return before_ != nullptr && std::memcmp(first(options), first(*before_), kNumbers * sizeof(PyObject*)) == 0;
  }

  void was_read(const Options& options) { before_ = &options; }

  const Hyperparameters& hyperparameters(const Options& options, Py_ssize_t index) {
    if (is_as_before(options)) return h_;
    h_ = {
        .lr = finite(options, Key::lr, index),
        .momentum = finite(options, Key::momentum, index),
        .dampening = finite(options, Key::dampening, index),
        .weight_decay = finite(options, Key::weight_decay, index),
        .nesterov = flag(options.required(Key::nesterov)),
        .maximize = flag(options.required(Key::maximize)),
        .scale_invariant = flag(options[Key::scale_invariant]),
        .trust = trust(options, index),
    };
    was_read(options);
    return h_;
  }

  Trust trust(const Options& options, Py_ssize_t index) const {
    if (options[Key::trust_coeff] == nullptr) return {};
    return {.coeff = finite(options, Key::trust_coeff, index),
            .eps = finite(options, Key::eps, index),
            .is_used = true,
            .clips = flag(options.required(Key::trust_clip)),
            .always_adapts = flag(options.required(Key::always_adapt))};
  }

  // Raises ValueError for a hyperparameter that is not finite, or below 0 where it may not be.
  double finite(const Options& options, Key key, Py_ssize_t index) const {
    return checked(number(options.required(key)), key, index);
  }

  static double checked(double value, Key key, Py_ssize_t index) {
    const bool at_least_0 = key != Key::lr && key != Key::dampening;
    if (!std::isfinite(value) || (at_least_0 && value < 0)) refuse(index, key, at_least_0 ? " of at least 0" : "", value);
    return value;
  }

  // Raises ValueError for what no step leaves behind.
  Scale scale(const StoredScale& stored, Py_ssize_t index) {
    if (stored.P == nullptr) return {};
    const bool whole = stored.exponent != nullptr && stored.kappa != nullptr;
    if (whole && PyFloat_CheckExact(stored.P) && PyLong_CheckExact(stored.exponent) && PyFloat_CheckExact(stored.kappa)) {
      const Scale scale{PyFloat_AS_DOUBLE(stored.P), PyLong_AsLongLong(stored.exponent), PyFloat_AS_DOUBLE(stored.kappa)};
      if (scale.P >= 1 && scale.P < 2 && scale.kappa >= 0 && std::isfinite(scale.kappa) && !PyErr_Occurred()) return scale;
      PyErr_Clear();
    }
    if (!slow_path) throw NeedsSlowPath{};
    check_scale_(index, py::handle(stored.group));
    return unchecked_scale(stored);
  }

  Scale unchecked_scale(const StoredScale& stored) {
    if (stored.P == nullptr) return {};
    return {number(stored.P), stored.exponent == nullptr ? 0 : py::cast<int64_t>(stored.exponent),
            stored.kappa == nullptr ? 0.0 : number(stored.kappa)};
  }

  // Reads a parameter and its gradient, to where they stay: to copy a Param at once would wait for the writes.
  TEXP_INLINE void read(PyObject* object, Param& param) {
    param.object = object;
    param.exact = THPVariable_CheckExact(object);
    if (param.exact) {
      using torch::autograd::AutogradMeta;
      const auto* meta = static_cast<AutogradMeta*>(THPVariable_Unpack(object).unsafeGetTensorImpl()->autograd_meta());
      if (meta != nullptr && meta->grad_.defined())
        param.grad = slow_path ? &held_grads_.emplace_back(meta->grad_) : &meta->grad_;
      return;
    }
    if (!slow_path) throw NeedsSlowPath{};
    const py::object grad = py::getattr(object, "grad");
    if (!grad.is_none()) param.foreign_grad = hold(grad.ptr());
  }

  // Its momentum buffer in optimizer.state, or null.
  TEXP_INLINE PyObject* buffer(const Param& param) {
    if (next_buffer_ < buffers_.size() && !slow_path) {
      const KnownBuffer& known = buffers_[next_buffer_];
      if (known.param == param.object && known.version != 0 && known.version == version_of(known.values)) {
        ++next_buffer_;
        return hold(known.buf);
      }
    }
    return look_up_buffer(param.object, param.exact);
  }

 private:
  // How many options the hyperparameters are made of.
  static constexpr int kNumbers = static_cast<int>(Key::always_adapt) - static_cast<int>(Key::lr) + 1;

  [[noreturn]] static void refuse(Py_ssize_t group, Key key, const char* what, double value) {
    char* text = PyOS_double_to_string(value, 'r', 0, Py_DTSF_ADD_DOT_0, nullptr);
    const std::string message = "parameter group " + std::to_string(group) + ": " + PyUnicode_AsUTF8(name(key)) +
                                " must be a finite number" + what + ", got " + text;
    PyMem_Free(text);
    throw py::value_error(message);
  }

  // As optimizer.state had it, at its present version, which keeps param and values alive.
  struct KnownBuffer {
    PyObject *param, *values, *buf;  // buf: null: none
    uint64_t version;                // of values
  };

  [[gnu::noinline]] PyObject* look_up_buffer(PyObject* param, bool is_exact) {
    PyObject* values = hold(state_of(param, is_exact));
    if (values == nullptr) return nullptr;
    if (!PyDict_Check(values)) throw py::type_error("optimizer.state must hold a dict for each parameter");
    PyObject *key, *buf = nullptr;
    Py_ssize_t position = 0;  // nearly always it is the first
    if (PyDict_Next(values, &position, &key, &buf) && key != momentum_buffer()) buf = item(values, momentum_buffer());
    if (hold(buf) == Py_None) buf = nullptr;
    if (next_buffer_ == buffers_.size()) buffers_.emplace_back();
    buffers_[next_buffer_++] = {param, values, buf, version_of(values)};
    return buf;
  }

  // State is nearly always in the order of the parameters, so that the next entry is looked at first. A tensor hashes
  // by identity in a Python method, which would cost more than the look-up.
  PyObject* state_of(PyObject* param, bool is_exact) {
    PyObject *key, *values;
    Py_ssize_t next = state_position_;
    if (PyDict_Next(state_, &next, &key, &values) && key == param) {
      state_position_ = next;
      return values;
    }
#if PY_VERSION_HEX < 0x030E0000
    if (is_exact) {
      values = _PyDict_GetItem_KnownHash(state_, param, reinterpret_cast<Py_hash_t>(param));
      if (values == nullptr && PyErr_Occurred()) throw py::error_already_set();
      return values;
    }
#endif
    return item(state_, param);
  }

  const py::object check_scale_;
  OptionsReader options_;
  const Options* before_ = nullptr;  // of the group whose hyperparameters were read last
  Hyperparameters h_;
  PyObject* state_ = nullptr;
  Py_ssize_t state_position_ = 0;
  uint64_t state_version_ = 0;
  std::vector<KnownBuffer> buffers_;  // in the order in which they are asked for
  size_t next_buffer_ = 0;
  std::vector<py::object> held_;
  std::deque<at::Tensor> held_grads_;  // a deque, so that pointers stay valid
};

}  // namespace texp
