// The host side of a step: walks the groups of an optimizer, checks everything, chooses each tensor's row, and runs the
// kernel. It builds no Python lists, and changes nothing before all checks have passed.
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <optional>
#include <string>

#include "plan.h"
#include "scale.h"

namespace texp {
namespace {

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
  TEXP_NAME(capturable);
  TEXP_NAME(scale);
  TEXP_NAME(scale_exponent);
  TEXP_NAME(carried_decay);
  TEXP_NAME(norm_stats);
  TEXP_NAME(momentum_buffer);
  TEXP_NAME(grad);
#undef TEXP_NAME
};

const Names& names() {
  static const Names made;
  return made;
}

PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);  // borrowed
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

PyObject* required(PyObject* group, PyObject* key) {
  PyObject* value = item(group, key);
  if (value == nullptr) throw py::key_error(PyUnicode_AsUTF8(key));
  return value;
}

double number(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  // Whether something is a tensor is a question that torch answers in Python.
  if (!PyLong_CheckExact(value) && THPVariable_Check(value)) return THPVariable_Unpack(value).item().toDouble();
  const double converted = PyFloat_AsDouble(value);
  if (converted == -1 && PyErr_Occurred()) throw py::error_already_set();
  return converted;
}

double number(PyObject* group, PyObject* key) { return number(required(group, key)); }

bool flag(PyObject* group, PyObject* key) {
  const int truth = PyObject_IsTrue(required(group, key));
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

[[noreturn]] void refuse(Py_ssize_t group, PyObject* name, const char* what, double value) {
  char* text = PyOS_double_to_string(value, 'r', 0, Py_DTSF_ADD_DOT_0, nullptr);
  const std::string message = "parameter group " + std::to_string(group) + ": " + PyUnicode_AsUTF8(name) +
                              " must be a finite number" + what + ", got " + text;
  PyMem_Free(text);
  throw py::value_error(message);
}

Hyperparameters hyperparameters(PyObject* group, Py_ssize_t index) {
  const Names& key = names();
  const Hyperparameters h{
      .lr = number(group, key.lr),
      .momentum = number(group, key.momentum),
      .dampening = number(group, key.dampening),
      .weight_decay = number(group, key.weight_decay),
      .nesterov = flag(group, key.nesterov),
      .maximize = flag(group, key.maximize),
      .scale_invariant = flag(group, key.scale_invariant),
  };
  const auto at_least_0 = [&](PyObject* name, double value) {
    if (!(std::isfinite(value) && value >= 0)) refuse(index, name, " of at least 0", value);
  };
  at_least_0(key.momentum, h.momentum);
  at_least_0(key.weight_decay, h.weight_decay);
  if (!std::isfinite(h.lr)) refuse(index, key.lr, "", h.lr);
  if (!std::isfinite(h.dampening)) refuse(index, key.dampening, "", h.dampening);
  return h;
}

void set(PyObject* dict, PyObject* key, py::object value) {
  if (PyDict_SetItem(dict, key, value.ptr()) != 0) throw py::error_already_set();
}

// Overwrites a float that nobody but its dict holds, which costs far less than to make and to set another; false where
// it cannot be done.
bool overwrite(PyObject* value, double number) {
#ifdef Py_GIL_DISABLED
  return false;
#else
  if (Py_REFCNT(value) != 1 || !PyFloat_CheckExact(value)) return false;
  reinterpret_cast<PyFloatObject*>(value)->ob_fval = number;
  return true;
#endif
}

// The scale of a group as its dict holds it. The objects are borrowed from it.
struct StoredScale {
  PyObject *group, *P, *exponent, *kappa;

  explicit StoredScale(PyObject* group)
      : group(group),
        P(required(group, names().scale)),
        exponent(required(group, names().scale_exponent)),
        kappa(required(group, names().carried_decay)) {}

  Scale read() const { return {number(P), static_cast<int64_t>(number(exponent)), number(kappa)}; }

  // borrowed: no Python code has run since.
  void write(const Scale& before, const Scale& after, bool borrowed) const {
    if (after.P != before.P && !(borrowed && overwrite(P, after.P))) set(group, names().scale, py::float_(after.P));
    if (after.exponent != before.exponent) set(group, names().scale_exponent, py::int_(after.exponent));
    if (after.kappa != before.kappa && !(borrowed && overwrite(kappa, after.kappa)))
      set(group, names().carried_decay, py::float_(after.kappa));
  }
};

// optimizer.state[param], or null. A tensor hashes by identity in a Python method, which would cost more than the look-up.
PyObject* state_of(PyObject* state, PyObject* param) {
#if PY_VERSION_HEX < 0x030E0000
  PyObject* values = _PyDict_GetItem_KnownHash(state, param, reinterpret_cast<Py_hash_t>(param));
  if (values == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return values;
#else
  return item(state, param);
#endif
}

PyObject* buffer_of(PyObject* state, PyObject* param) {
  PyObject* values = state_of(state, param);
  if (values == nullptr || !PyDict_Check(values)) return nullptr;
  PyObject* buf = item(values, names().momentum_buffer);
  return buf == Py_None ? nullptr : buf;
}

py::tuple as_tuple(const Row<double>& r) {
  return py::make_tuple(r.a_b, r.a_g, r.a_p, r.c_u, r.c_g, r.c_p, r.s_p, r.e, r.r_u, r.r_d);
}

bool keeps(const Row<double>& r) {
  return r.a_b == 1 && r.a_g == 0 && r.a_p == 0 && r.c_u == 0 && r.c_g == 0 && r.c_p == 0 && r.s_p == 1 && r.e == 0 &&
         r.r_u == 1 && r.r_d == 0;
}

struct Param {
  PyObject* object;
  const at::Tensor* grad;  // of a torch.Tensor or Parameter; null: none
  PyObject* foreign_grad;  // of a subclass, fetched through Python; null: none
  PyObject* buf;           // null: none
  bool exact;              // a torch.Tensor or Parameter

  bool has_grad() const { return grad != nullptr || foreign_grad != nullptr; }
  py::object grad_object() const {
    if (grad != nullptr) return py::reinterpret_steal<py::object>(THPVariable_Wrap(*grad));
    return py::reinterpret_borrow<py::object>(foreign_grad != nullptr ? foreign_grad : Py_None);
  }
};

// One step of a group, and its rows in the plan (-1: not yet in it).
struct Advanced {
  Scale scale;
  Hyperparameters h;
  bool first;
  Step step;
  int32_t running = -1, starting = -1, idle = -1;

  Advanced(const Scale& scale, const Hyperparameters& h, bool first, double grad_scale)
      : scale(scale), h(h), first(first), step(advance(scale, h, first, grad_scale)) {}

  bool is_of(const Scale& scale, const Hyperparameters& h, bool first) const {
    return this->first == first && this->scale == scale && this->h == h;
  }
};

struct Rescaled {
  StoredScale stored;
  size_t step;  // which of Scratch::steps
};

// What a step works with, kept from step to step for its memory.
struct Scratch {
  Plan plan;
  std::vector<Param> params;                                // of one group
  std::vector<py::object> foreign_grads;                    // keeps them alive
  std::vector<Advanced> steps;                              // groups in a row that stand at the same point share one
  std::vector<Rescaled> rescaled;                           // groups whose scale changes
  std::vector<std::pair<PyObject*, at::Tensor>> new_bufs;   // of parameters that take their first step
  bool busy = false;

  void clear() {
    plan.clear();
    params.clear();
    foreign_grads.clear();
    steps.clear();
    rescaled.clear();
    new_bufs.clear();
  }
};

Param param_of(PyObject* object, std::vector<py::object>& foreign_grads) {
  Param param{object, nullptr, nullptr, nullptr, THPVariable_CheckExact(object)};
  if (param.exact) {
    const at::Tensor& grad = THPVariable_Unpack(object).unsafeGetTensorImpl()->grad();
    if (grad.defined()) param.grad = &grad;
  } else {
    py::object grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, names().grad));
    if (!grad) throw py::error_already_set();
    if (!grad.is_none()) {
      param.foreign_grad = grad.ptr();
      foreign_grads.push_back(std::move(grad));
    }
  }
  return param;
}

// Takes one step of all tensors that the kernel can take.
//
// Returns what is left to do: a list of (group index, reason, row, param, grad, buffer or None, whether the buffer is to be
// made). `check` is called with that list, if it is not empty, before anything is changed; it may raise.
py::list step(const py::list& groups, const py::dict& state, double grad_scale, const py::object& check) {
  const Names& key = names();
  at::NoGradGuard no_grad;
  thread_local Scratch kept;
  std::optional<Scratch> own;  // where `check` or a hook steps another optimizer meanwhile
  if (kept.busy) own.emplace();
  Scratch& scratch = own ? *own : kept;
  struct Busy {
    Scratch& scratch;
    explicit Busy(Scratch& s) : scratch(s) { s.busy = true; }
    ~Busy() {
      scratch.clear();
      scratch.busy = false;
    }
  } busy(scratch);
  Plan& plan = scratch.plan;
  std::vector<Param>& params = scratch.params;
  py::list left;

  for (Py_ssize_t index = 0; index < PyList_GET_SIZE(groups.ptr()); ++index) {
    PyObject* group = PyList_GET_ITEM(groups.ptr(), index);
    PyObject* list = required(group, key.params);
    params.clear();
    bool steps = false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
      params.push_back(param_of(PyList_GET_ITEM(list, i), scratch.foreign_grads));
      steps = steps || params.back().has_grad();
    }
    if (!steps) continue;

    if (flag(group, key.capturable)) py::module_::import("texp.backends").attr("check_capturable")();
    const Hyperparameters h = hyperparameters(group, index);
    const StoredScale stored(group);
    const Scale scale = stored.read();
    const bool ordinary = !h.scale_invariant && scale.P == 1 && scale.kappa == 0;
    bool first = true;
    if (h.momentum != 0 || !ordinary) {
      for (Param& param : params) {
        param.buf = buffer_of(state.ptr(), param.object);
        first = first && param.buf == nullptr;
      }
    }
    if (scratch.steps.empty() || !scratch.steps.back().is_of(scale, h, first))
      scratch.steps.emplace_back(scale, h, first, grad_scale);
    Advanced& advanced = scratch.steps.back();
    const Step& rows = advanced.step;
    if (!ordinary) scratch.rescaled.push_back({stored, scratch.steps.size() - 1});

    const bool idle_keeps = keeps(rows.idle);
    for (const Param& param : params) {
      if (!param.has_grad() && idle_keeps) continue;
      const bool starts = param.has_grad() && param.buf == nullptr && h.momentum != 0;
      const Row<double>& row = !param.has_grad() ? rows.idle : starts ? rows.first : rows.running;
      int32_t& choice = !param.has_grad() ? advanced.idle : starts ? advanced.starting : advanced.running;
      if (choice < 0) choice = plan.add_row(row);
      const char* reason = "is a subclass of torch.Tensor";
      if (param.exact && (param.buf == nullptr || THPVariable_CheckExact(param.buf))) {
        const at::Tensor& p = THPVariable_Unpack(param.object);
        if (!starts) {
          reason = plan.take(p, param.grad, param.buf == nullptr ? nullptr : &THPVariable_Unpack(param.buf), choice);
        } else if ((reason = unsupported(p)) == nullptr && (reason = unsupported(*param.grad)) == nullptr) {
          scratch.new_bufs.emplace_back(param.object, at::zeros_like(p));
          reason = plan.take(p, param.grad, &scratch.new_bufs.back().second, choice);
          if (reason != nullptr) scratch.new_bufs.pop_back();
        }
      }
      if (reason != nullptr) {
        left.append(py::make_tuple(index, reason, as_tuple(row), py::handle(param.object), param.grad_object(),
                                   py::reinterpret_borrow<py::object>(param.buf == nullptr ? Py_None : param.buf), starts));
      }
    }
    PyObject* stats = rows.growth == 1 ? nullptr : item(group, key.norm_stats);
    for (Py_ssize_t i = 0; stats != nullptr && i < PyList_GET_SIZE(stats); ++i) {
      const auto pair = py::reinterpret_borrow<py::tuple>(PyList_GET_ITEM(stats, i));
      Row<double> row{};
      row.s_p = std::pow(rows.growth, pair[1].cast<double>());
      const char* reason = "is a subclass of torch.Tensor";
      if (THPVariable_CheckExact(pair[0].ptr()))
        reason = plan.take(THPVariable_Unpack(pair[0].ptr()), nullptr, nullptr, plan.add_row(row));
      if (reason != nullptr)
        left.append(py::make_tuple(index, reason, as_tuple(row), pair[0], py::none(), py::none(), false));
    }
  }

  if (PyList_GET_SIZE(left.ptr()) != 0) check(left);
  plan.run();
  for (auto& [param, buf] : scratch.new_bufs) {
    const py::object values = state[py::handle(param)];
    set(values.ptr(), key.momentum_buffer, py::reinterpret_steal<py::object>(THPVariable_Wrap(buf)));
  }
  const bool borrowed = PyList_GET_SIZE(left.ptr()) == 0 && scratch.new_bufs.empty() && !plan.lends_interpreter();
  for (const auto& [stored, i] : scratch.rescaled) stored.write(scratch.steps[i].scale, scratch.steps[i].step.scale, borrowed);
  return left;
}

Row<double> as_row(const py::tuple& t) {
  const auto at = [&](size_t i) { return t[i].cast<double>(); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9)};
}

// theory.advance, for tests: rows of a running, a first and an idle tensor, the scale after the step, and growth.
py::tuple advance_tuple(const py::tuple& scale, const py::tuple& h, bool first, double grad_scale) {
  const Step step =
      advance({scale[0].cast<double>(), scale[1].cast<int64_t>(), scale[2].cast<double>()},
              {h[0].cast<double>(), h[1].cast<double>(), h[2].cast<double>(), h[3].cast<double>(), h[4].cast<bool>(),
               h[5].cast<bool>(), h[6].cast<bool>()},
              first, grad_scale);
  return py::make_tuple(as_tuple(step.running), as_tuple(step.first), as_tuple(step.idle),
                        py::make_tuple(step.scale.P, step.scale.exponent, step.scale.kappa), step.growth);
}

// texp.reference.apply for tensors that the kernel can take; raises ValueError, with the reason, for others.
void apply(const py::tuple& row, const py::iterable& entries) {
  at::NoGradGuard no_grad;
  Plan plan;
  const int32_t index = plan.add_row(as_row(row));
  const auto tensor = [](const py::handle& object) -> const at::Tensor* {
    if (object.is_none()) return nullptr;
    if (!THPVariable_CheckExact(object.ptr())) throw py::value_error("a tensor is a subclass of torch.Tensor");
    return &THPVariable_Unpack(object.ptr());
  };
  const py::list kept(entries);
  for (const py::handle& entry : kept) {
    const auto t = py::reinterpret_borrow<py::tuple>(entry);
    if (const char* reason = plan.take(*tensor(t[0]), tensor(t[1]), tensor(t[2]), index))
      throw py::value_error(std::string("a tensor ") + reason);
  }
  plan.run();
}

}  // namespace
}  // namespace texp

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ core of texp; see texp/optimizer.py and texp/backends.py.";
  module.def("observed", &at::hasCallbacks, "Whether a profiler or another observer is to see the next step.");
  module.def("step", &texp::step, py::arg("groups"), py::arg("state"), py::arg("grad_scale"), py::arg("check"));
  module.def("advance", &texp::advance_tuple, py::arg("scale"), py::arg("hyper"), py::arg("first"), py::arg("grad_scale"));
  module.def("cpu_variants", &texp::cpu_variants);
  module.def("use_cpu_variant", &texp::use_cpu_variant, py::arg("name"));
  module.def("apply", &texp::apply, py::arg("row"), py::arg("entries"));
}
