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
#include <deque>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../math/scale.h"

namespace texp {

namespace py = pybind11;

// Names of keys and attributes, made once.
struct Names {
#define TEXP_NAME(name) PyObject* name = PyUnicode_InternFromString(#name)
  TEXP_NAME(params);
  TEXP_NAME(lr);
  TEXP_NAME(momentum);
  TEXP_NAME(dampening);
  TEXP_NAME(weight_decay);
  TEXP_NAME(nesterov);
  TEXP_NAME(maximize);
  TEXP_NAME(scale_invariant);
  TEXP_NAME(scale);
  TEXP_NAME(scale_exponent);
  TEXP_NAME(carried_decay);
  TEXP_NAME(norm_stats);
  TEXP_NAME(swa_lr);
  TEXP_NAME(started);
  TEXP_NAME(momentum_buffer);
  TEXP_NAME(grad);
#undef TEXP_NAME
};

inline const Names& names() {
  static const Names made;
  return made;
}

inline PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);  // borrowed
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline PyObject* required(PyObject* dict, PyObject* key) {
  PyObject* value = item(dict, key);
  if (value == nullptr) throw py::key_error(PyUnicode_AsUTF8(key));
  return value;
}

inline void set(PyObject* dict, PyObject* key, const py::object& value) {
  if (PyDict_SetItem(dict, key, value.ptr()) != 0) throw py::error_already_set();
}

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
  PyObject *group, *P, *exponent = nullptr, *kappa = nullptr;

  explicit StoredScale(PyObject* group) : group(group), P(item(group, names().scale)) {
    if (P == nullptr) return;
    exponent = item(group, names().scale_exponent);
    kappa = item(group, names().carried_decay);
  }

  // fresh: no Python code has run since it was read.
  void write(const Scale& before, const Scale& after, bool fresh) const {
    if (P == nullptr || exponent == nullptr || kappa == nullptr) {
      set(group, names().scale, py::float_(after.P));
      set(group, names().scale_exponent, py::int_(after.exponent));
      set(group, names().carried_decay, py::float_(after.kappa));
      return;
    }
    if (after.P != before.P && !(fresh && overwrite(P, after.P))) set(group, names().scale, py::float_(after.P));
    if (after.exponent != before.exponent) set(group, names().scale_exponent, py::int_(after.exponent));
    if (after.kappa != before.kappa && !(fresh && overwrite(kappa, after.kappa)))
      set(group, names().carried_decay, py::float_(after.kappa));
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

// The statistics of each group and their powers of P, as texp.step.norm_stats finds them; null: no group has any. Runs Python
// code.
inline py::object found_stats(const py::list& groups, const py::dict& norm_stats) {
  bool any = PyDict_GET_SIZE(norm_stats.ptr()) != 0;
  for (Py_ssize_t i = 0; !any && i < PyList_GET_SIZE(groups.ptr()); ++i)
    any = item(PyList_GET_ITEM(groups.ptr(), i), names().norm_stats) != nullptr;
  return any ? norm_stats.attr("found")(groups) : py::object();
}

// Calls `each` with every statistic of a group and its power.
template <class F>
void for_each_stat(const py::object& found, Py_ssize_t index, F&& each) {
  if (!found) return;
  PyObject* stats = PyList_GET_ITEM(found.ptr(), index);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(stats); ++i) {
    PyObject* pair = PyList_GET_ITEM(stats, i);
    each(PyTuple_GET_ITEM(pair, 0), PyFloat_AS_DOUBLE(PyTuple_GET_ITEM(pair, 1)));
  }
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

// Thrown where reading on could run Python code.
struct Unusual {};

// Where options are floats, ints, bools and tensors, and parameters are torch.Tensor or Parameter, reading them runs no
// Python code: what was read cannot change or vanish meanwhile, and is borrowed. A reader that is not `careful` throws
// Unusual where anything else stands; a careful one reads everything and holds all that it reads.
class Reader {
 public:
#if PY_VERSION_HEX < 0x030E0000
  static constexpr bool always_careful = false;
#else
  static constexpr bool always_careful = true;  // to look a tensor up in a dict runs Python code
#endif

  bool careful = always_careful;

  void clear() {
    held_.clear();
    held_grads_.clear();
  }

  PyObject* hold(PyObject* object) {
    if (careful) [[unlikely]]
      held_.push_back(py::reinterpret_borrow<py::object>(object));
    return object;
  }

  double number(PyObject* value) const {
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    // Whether something is a tensor is a question that takes torch long to answer.
    if (!PyLong_CheckExact(value)) {
      if (THPVariable_CheckExact(value)) return THPVariable_Unpack(value).item().toDouble();
      if (!careful) throw Unusual{};
      if (THPVariable_Check(value)) return THPVariable_Unpack(value).item().toDouble();
    }
    const double converted = PyFloat_AsDouble(value);
    if (converted == -1 && PyErr_Occurred()) throw py::error_already_set();
    return converted;
  }

  bool flag(PyObject* value) const {
    if (value == Py_True || value == Py_False || value == Py_None) return value == Py_True;
    if (!careful) throw Unusual{};
    const int truth = PyObject_IsTrue(value);
    if (truth < 0) throw py::error_already_set();
    return truth != 0;
  }

  Hyperparameters hyperparameters(PyObject* group, Py_ssize_t index) {
    const Names& key = names();
    const auto number_of = [&](PyObject* name) { return number(hold(required(group, name))); };
    const auto flag_of = [&](PyObject* name) { return flag(hold(required(group, name))); };
    const Hyperparameters h{
        .lr = number_of(key.lr),
        .momentum = number_of(key.momentum),
        .dampening = number_of(key.dampening),
        .weight_decay = number_of(key.weight_decay),
        .nesterov = flag_of(key.nesterov),
        .maximize = flag_of(key.maximize),
        .scale_invariant = scale_invariant(group),
    };
    check_number(index, key.momentum, h.momentum);
    check_number(index, key.weight_decay, h.weight_decay);
    check_number(index, key.lr, h.lr);
    check_number(index, key.dampening, h.dampening);
    return h;
  }

  bool scale_invariant(PyObject* group) {
    PyObject* value = item(group, names().scale_invariant);
    return value != nullptr && flag(hold(value));
  }

  // Whether a group without parameters has taken a step with momentum.
  bool started(PyObject* group) {
    PyObject* value = item(group, names().started);
    return value != nullptr && flag(hold(value));
  }

  // Raises ValueError for a hyperparameter that is not finite, or below 0 where it may not be.
  static void check_number(Py_ssize_t index, PyObject* name, double value) {
    const bool at_least_0 = name == names().momentum || name == names().weight_decay;
    if (!std::isfinite(value) || (at_least_0 && value < 0)) refuse(index, name, at_least_0 ? " of at least 0" : "", value);
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
    if (!careful) throw Unusual{};
    check(stored.group, index);
    return {number(stored.P), stored.exponent == nullptr ? 0 : py::cast<int64_t>(stored.exponent),
            stored.kappa == nullptr ? 0.0 : number(stored.kappa)};
  }

  // Adds a parameter. Written where it stays: to copy it at once would wait for the writes.
  Param& param(PyObject* object, std::vector<Param>& to) {
    Param& param = to.emplace_back();
    param.object = hold(object);
    param.exact = THPVariable_CheckExact(object);
    if (param.exact) {
      const at::Tensor& grad = THPVariable_Unpack(object).unsafeGetTensorImpl()->grad();
      if (grad.defined()) param.grad = careful ? &held_grads_.emplace_back(grad) : &grad;
      return param;
    }
    if (!careful) throw Unusual{};
    const py::object grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, names().grad));
    if (!grad) throw py::error_already_set();
    if (!grad.is_none()) param.foreign_grad = hold(grad.ptr());
    return param;
  }

  // The momentum buffer in optimizer.state, or null.
  PyObject* buffer(PyObject* state, const Param& param) {
    PyObject* values = hold(state_of(state, param));
    if (values == nullptr) return nullptr;
    if (!PyDict_Check(values)) throw py::type_error("optimizer.state must hold a dict for each parameter");
    PyObject* buf = hold(item(values, names().momentum_buffer));
    return buf == Py_None ? nullptr : buf;
  }

 private:
  [[noreturn]] static void refuse(Py_ssize_t group, PyObject* name, const char* what, double value) {
    char* text = PyOS_double_to_string(value, 'r', 0, Py_DTSF_ADD_DOT_0, nullptr);
    const std::string message = "parameter group " + std::to_string(group) + ": " + PyUnicode_AsUTF8(name) +
                                " must be a finite number" + what + ", got " + text;
    PyMem_Free(text);
    throw py::value_error(message);
  }

  // Raises where the group's scale is wrong.
  static void check(PyObject* group, Py_ssize_t index) {
    py::module_::import("texp.step.groups").attr("check_step")(index, py::handle(group));
  }

  // A tensor hashes by identity in a Python method, which would cost more than the look-up.
  static PyObject* state_of(PyObject* state, const Param& param) {
#if PY_VERSION_HEX < 0x030E0000
    if (param.exact) {
      PyObject* values = _PyDict_GetItem_KnownHash(state, param.object, reinterpret_cast<Py_hash_t>(param.object));
      if (values == nullptr && PyErr_Occurred()) throw py::error_already_set();
      return values;
    }
#endif
    return item(state, param.object);
  }

  std::vector<py::object> held_;
  std::deque<at::Tensor> held_grads_;  // a deque, so that pointers stay valid
};

}  // namespace texp
