// A step over parameter groups, as texp/step/gather.py would take it: a walk that changes nothing, then whatever can fail, then
// the kernel.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <deque>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "python.h"
#include "launch.h"
#include "tensor_list.h"
#include "../math/scale.h"

namespace texp {

inline py::tuple as_tuple(const Row<double>& r) {
  return py::make_tuple(r.a_b, r.a_g, r.a_p, r.c_u, r.c_g, r.c_p, r.s_p, r.e, r.r_u, r.r_d);
}

inline Row<double> as_row(const py::tuple& t) {
  const auto at = [&](size_t i) { return t[i].cast<double>(); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9)};
}

inline bool keeps(const Row<double>& r) {
  return r.a_b == 1 && r.a_g == 0 && r.a_p == 0 && r.c_u == 0 && r.c_g == 0 && r.c_p == 0 && r.s_p == 1 && r.e == 0 &&
         r.r_u == 1 && r.r_d == 0;
}

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

// Who takes the tensors on a device: nobody, a kernel of this library, or one that is called from Python.
struct Taker {
  bool takes = false;
  py::handle kernel;  // null: that of this library

  Taker() = default;
  explicit Taker(const py::object& given) : takes(given.ptr() != Py_False) {
    if (!py::isinstance<py::bool_>(given)) kernel = given;
  }
};

// The walk over the groups, and what it found.
class Walk {
 public:
  bool busy = false;

  // Forgets everything, but keeps the memory for the next step.
  void clear() {
    clear_plans();
    forget();
    found_ = {};
    momentum_dtype_ = {};
    reader_.careful = Reader::always_careful;
  }

  // Walks over the groups and changes nothing. cpu, cuda: who takes the tensors there.
  void walk(const py::list& groups, const py::dict& norm_stats, const py::dict& state, double grad_scale,
            const MomentumDtype& momentum_dtype, const Taker& cpu, const Taker& cuda) {
    start(cpu, cuda);
    momentum_dtype_ = momentum_dtype;
    found_ = found_stats(groups, norm_stats);
    try {
      walk_once(groups, state, grad_scale);
    } catch (const Unusual&) {
      clear_plans();
      walk_carefully(groups, state, grad_scale);
    }
    bool shared = false;
    for_each_plan([&](Plan& plan) { shared = plan.has_shared_memory() || shared; });
    if (shared) {
      for_each_plan([](Plan& plan) { plan.forget_items(); });
      walk_carefully(groups, state, grad_scale);
    }
    // From here on Python code may run: what is left to the reference is looked at, state is made for new buffers, or
    // another thread has the interpreter.
    if (!left_.empty() || !new_bufs_.empty() || on_cpu_.lends_interpreter() || cpu_.kernel || cuda_.kernel) hold();
  }

  // Takes tensors for rows that are given: pairs of a row and (param, None, buffer or None).
  // Returns the places of those that the kernels do not take.
  std::vector<size_t> walk_rows(const std::vector<py::tuple>& work, const Taker& cpu, const Taker& cuda) {
    start(cpu, cuda);
    std::vector<size_t> left;
    PyObject* last = nullptr;
    int32_t row = -1;
    for (size_t i = 0; i < work.size(); ++i) {
      const py::object given = work[i][0];
      const py::tuple entry = work[i][1];
      if (given.ptr() != last) row = rows_.add(as_row(given));
      last = given.ptr();
      const py::object buf = entry[2];
      const py::object p = entry[0];
      const bool plain = THPVariable_CheckExact(p.ptr()) && (buf.is_none() || THPVariable_CheckExact(buf.ptr()));
      Plan* plan = plain && !watched_ ? plan_of(THPVariable_Unpack(p.ptr()).device()) : nullptr;
      const at::Tensor* b = buf.is_none() ? nullptr : &THPVariable_Unpack(buf.ptr());
      if (plan == nullptr || plan->take(THPVariable_Unpack(p.ptr()), nullptr, b, row)) left.push_back(i);
    }
    bool shared = false;
    for_each_plan([&](Plan& plan) { shared = plan.has_shared_memory() || shared; });
    if (shared) {
      for_each_plan([](Plan& plan) { plan.forget_items(); });
      left.resize(work.size());
      std::iota(left.begin(), left.end(), size_t{0});
    }
    hold();
    return left;
  }

  // Whether a group in exponential form has the LR of torch.optim.swa_utils.SWALR: somebody averages its weights.
  bool averaged() const { return averaged_; }

  // (group index, why, row, param, grad, buffer or None, whether it is yet to be made) of each tensor that the kernel
  // does not take; for a tensor of norm_stats, `why` is None.
  py::list left() const {
    py::list list;
    for (const Left& l : left_) {
      const auto or_none = [](PyObject* object) {
        return py::reinterpret_borrow<py::object>(object == nullptr ? Py_None : object);
      };
      const Param& p = l.param;
      const py::object grad = p.grad == nullptr ? or_none(p.foreign_grad)
                                                : py::reinterpret_steal<py::object>(THPVariable_Wrap(*p.grad));
      py::object why = py::none();
      if (l.refusal) why = py::str(std::string(l.refusal.who) + " " + l.refusal.why);
      list.append(py::make_tuple(l.group, why, as_tuple(rows_.wide[l.row]), or_none(p.object), grad, or_none(p.buf),
                                 l.starts));
    }
    return list;
  }

  // Finds, or makes, where the new buffers are going to be.
  void find_states(const py::dict& state) {
    for (NewBuf& made : new_bufs_) made.values = values_of(state, made.param);
  }

  // Takes back what find_states made, after an error.
  void drop_states(const py::dict& state) {
    for (NewBuf& made : new_bufs_) drop_if_empty(state, made.param);
  }

  void run() {
    for (auto& plan : on_cuda_) cuda_.kernel ? launch(*plan, rows_, cuda_.kernel) : launch(*plan, rows_);
    if (cpu_.kernel) {
      launch(on_cpu_, rows_, cpu_.kernel);
    } else if (on_cpu_.lends_interpreter()) {
      const py::gil_scoped_release release;
      on_cpu_.run();
    } else {
      on_cpu_.run();
    }
    for_each_plan([](Plan& plan) { plan.bump_versions(); });
    for (const auto& [stored, i, starts] : rescaled_) {
      stored.write(steps_[i].scale, steps_[i].step.scale, !held_);
      if (starts) set(stored.group, names().started, py::bool_(true));
    }
    for (const NewBuf& made : new_bufs_)
      set(made.values.ptr(), names().momentum_buffer, py::reinterpret_steal<py::object>(THPVariable_Wrap(made.buf)));
  }

 private:
  struct Left {
    Py_ssize_t group;
    Refusal refusal;
    int32_t row;
    Param param;
    bool starts;
  };

  struct Rescaled {
    StoredScale stored;
    size_t step;  // which of steps_
    bool starts;  // it has no parameters here whose buffers would tell that it has begun
  };

  struct NewBuf {
    PyObject* param;
    at::Tensor buf;
    py::object values;  // optimizer.state[param]
  };

  void forget() {
    reader_.clear();
    rows_.clear();
    params_.clear();
    steps_.clear();
    rescaled_.clear();
    new_bufs_.clear();
    left_.clear();
    objects_.clear();
    grads_of_left_.clear();
    held_ = averaged_ = false;
  }

  void start(const Taker& cpu, const Taker& cuda) {
    cpu_ = cpu;
    cuda_ = cuda;
    watched_ = c10::impl::TorchDispatchModeTLS::any_modes_set();
  }

  void walk_carefully(const py::list& groups, const py::dict& state, double grad_scale) {
    forget();
    reader_.careful = held_ = true;
    walk_once(groups, state, grad_scale);
  }

  void walk_once(const py::list& groups, const py::dict& state, double grad_scale) {
    for (Py_ssize_t index = 0; index < PyList_GET_SIZE(groups.ptr()); ++index)
      walk_group(index, PyList_GET_ITEM(groups.ptr(), index), state.ptr(), grad_scale);
  }

  void walk_group(Py_ssize_t index, PyObject* group, PyObject* state, double grad_scale) {
    const Names& key = names();
    reader_.hold(group);
    PyObject* list = reader_.hold(required(group, key.params));
    if (!PyList_Check(list) && !PyTuple_Check(list)) throw py::type_error("group['params'] must be a list");
    params_.clear();
    bool steps = false;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(list); ++i) {
      const Param& param = reader_.param(PySequence_Fast_GET_ITEM(list, i), params_);
      steps = steps || param.has_grad();
    }
    // A group in exponential form of which this process holds no parameter follows the others' (texp/step/groups.py `steps`).
    const bool empty = params_.empty();
    if (!steps && !empty) return;

    const Hyperparameters h = reader_.hyperparameters(group, index);
    const StoredScale stored(group);
    const Scale scale = reader_.scale(stored, index);
    const bool ordinary = !h.scale_invariant && scale.P == 1 && scale.kappa == 0;
    if (ordinary && empty) return;
    bool first = !empty || !(reader_.started(group) || scale != Scale{});
    if (h.momentum != 0 || !ordinary) {
      for (Param& param : params_) {
        param.buf = reader_.buffer(state, param);
        first = first && param.buf == nullptr;
      }
    }
    if (steps_.empty() || !steps_.back().is_of(scale, h, first)) steps_.emplace_back(scale, h, first, grad_scale);
    Advanced& advanced = steps_.back();
    if (!ordinary) rescaled_.push_back({stored, steps_.size() - 1, empty && h.momentum != 0});

    const bool idle_keeps = keeps(advanced.step.idle);
    for (const Param& param : params_) {
      if (!param.has_grad() && idle_keeps) continue;
      const bool starts = param.has_grad() && param.buf == nullptr && h.momentum != 0;
      const int32_t row = !param.has_grad() ? row_of(advanced.idle, advanced.step.idle)
                          : starts          ? row_of(advanced.starting, advanced.step.first)
                                            : row_of(advanced.running, advanced.step.running);
      if (const Refusal refusal = take(param, starts, row)) left_.push_back({index, refusal, row, param, starts});
    }
    if (ordinary) return;
    averaged_ = averaged_ || item(group, key.swa_lr) != nullptr;
    for_each_stat(found_, index, [&](PyObject* stat, double power) {
      if (advanced.step.growth == 1) return;
      Row<double> row{};
      row.s_p = power_of(advanced.step.growth, power);
      const int32_t added = rows_.add(row);
      const Param param{stat, static_cast<bool>(THPVariable_CheckExact(stat)), nullptr, nullptr};
      if (take(param, false, added)) left_.push_back({index, {}, added, param, false});
    });
  }

  int32_t row_of(int32_t& index, const Row<double>& row) {
    if (index < 0) index = rows_.add(row);
    return index;
  }

  Refusal take(const Param& param, bool starts, int32_t row) {
    if (watched_)
      return {"the parameter", "is stepped under a TorchDispatchMode, which is to see what happens to it"};
    if (!param.exact) return {"the parameter", "is a subclass of torch.Tensor"};
    const at::Tensor& p = THPVariable_Unpack(param.object);
    Plan* plan = plan_of(p.device());
    if (plan == nullptr) return {"the parameter", "is on a device whose kernel is not asked for or cannot be used here"};
    if (param.buf != nullptr) {
      if (!THPVariable_CheckExact(param.buf)) return {"its momentum buffer", "is not a torch.Tensor"};
      const at::Tensor& buf = THPVariable_Unpack(param.buf);
      if (momentum_dtype_ != at::kDouble && plan->take_usual(p, param.grad, &buf, row)) return {};
      if (wide_enough(p, buf, momentum_dtype_) == buf.scalar_type()) return plan->take(p, param.grad, &buf, row);
    } else if (!starts) {
      return plan->take(p, param.grad, nullptr, row);
    }
    return take_with_new_buffer(*plan, param, row);
  }

  // For a tensor's first step, or one whose buffer is narrower than it is to be.
  [[gnu::noinline]] Refusal take_with_new_buffer(Plan& plan, const Param& param, int32_t row) {
    const at::Tensor& p = THPVariable_Unpack(param.object);
    at::Tensor made;
    if (param.buf != nullptr) {
      const at::Tensor& buf = THPVariable_Unpack(param.buf);
      if (const char* why = unwritable(buf)) return {"its momentum buffer", why};
      made = widened(buf, wide_enough(p, buf, momentum_dtype_));
    } else {
      if (const char* why = unwritable(p)) return {"the parameter", why};
      if (const char* why = unsupported(*param.grad)) return {"its gradient", why};
      made = new_buffer(p, *param.grad, momentum_dtype_);
    }
    const Refusal refusal = plan.take(p, param.grad, &made, row);
    if (!refusal) new_bufs_.push_back({param.object, made, {}});
    return refusal;
  }

  void hold() {
    held_ = true;
    for_each_plan([](Plan& plan) { plan.hold(); });
    const auto keep = [&](PyObject* object) { objects_.push_back(py::reinterpret_borrow<py::object>(object)); };
    for (const Rescaled& r : rescaled_) keep(r.stored.group);
    for (const NewBuf& made : new_bufs_) keep(made.param);
    for (Left& l : left_) {
      keep(l.param.object);
      if (l.param.grad != nullptr) l.param.grad = &grads_of_left_.emplace_back(*l.param.grad);
      if (l.param.buf != nullptr) keep(l.param.buf);
    }
  }

  template <class F>
  void for_each_plan(F&& f) {
    f(on_cpu_);
    for (auto& plan : on_cuda_) f(*plan);
  }

  void clear_plans() {
    for_each_plan([](Plan& plan) { plan.clear(); });
  }

  // Null: tensors there are not taken.
  Plan* plan_of(c10::Device device) {
    if (device.is_cpu()) return cpu_.takes ? &on_cpu_ : nullptr;
    if (!device.is_cuda() || !cuda_.takes) return nullptr;
    for (auto& plan : on_cuda_)
      if (plan->device() == device) return plan.get();
    return on_cuda_.emplace_back(std::make_unique<Plan>(rows_, device)).get();
  }

  Reader reader_;
  py::object found_;  // statistics, see found_stats
  MomentumDtype momentum_dtype_;
  Rows rows_;
  Plan on_cpu_{rows_, c10::Device(c10::kCPU)};
  std::vector<std::unique_ptr<Plan>> on_cuda_;
  std::vector<Param> params_;        // of one group
  std::vector<Advanced> steps_;      // groups in a row that stand at the same point share one
  std::vector<Rescaled> rescaled_;   // groups whose scale changes
  std::vector<NewBuf> new_bufs_;     // of parameters that take their first step
  std::vector<Left> left_;           // what the kernel does not take
  std::vector<py::object> objects_;  // kept alive
  std::deque<at::Tensor> grads_of_left_;
  Taker cpu_, cuda_;
  bool watched_ = false;  // by a TorchDispatchMode
  bool averaged_ = false;
  bool held_ = false;     // whether everything is kept alive, so that Python code may run
};

}  // namespace texp
