// A step of groups whose P and κ are in device memory: as Walk, but the rows are computed by the kernel, so that a skipped
// step, or the replay of a captured one, needs no word from the host.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>
#include <utility>
#include <vector>

#include "../cuda/kernels.h"
#include "python.h"
#include "launch.h"
#include "tensor_list.h"

namespace texp {

// What lives on the device between steps.
struct OnDevice {
  at::Tensor states;   // float64 [groups, 4]: cuda::State
  at::Tensor started;  // uint8 [parameters of all groups]
  at::Tensor ticket;   // int32 [1]
};

class DeviceWalk {
 public:
  // kernel: is called from Python with the tables and takes the place of that of this library, if it is not None.
  DeviceWalk(const OnDevice& on_device, const MomentumDtype& momentum_dtype, bool capturing, const py::object& kernel)
      : on_device_(on_device),
        momentum_dtype_(momentum_dtype),
        capturing_(capturing),
        kernel_(kernel),
        plan_(rows_, on_device.states.device()) {}

  // Walks over the groups and changes nothing. Returns why the step cannot be taken in this way, or null;
  // the text lives as long as this object.
  const char* walk(const py::list& groups, const py::dict& norm_stats, const py::dict& state) {
    found_ = found_stats(groups, norm_stats);
    const char* why = nullptr;
    try {
      why = walk_groups(groups, state);
    } catch (const Unusual&) {
      plan_.clear();
      tensors_.clear();
      groups_.clear();
      new_bufs_.clear();
      started_.clear();
      reader_.careful = true;
      why = walk_groups(groups, state);
    }
    if (why != nullptr) return why;
    if (groups_.size() > UINT16_MAX) return "there are more than 65,535 groups";
    if (plan_.has_shared_memory()) return "parameters, buffers or norm_stats share memory";
    // From here on Python code may run: state is made for new buffers, or the kernel is called.
    if (!new_bufs_.empty() || !kernel_.is_none()) plan_.hold();
    for (NewBuf& made : new_bufs_) made.values = values_of(state, made.param);
    return nullptr;
  }

  // Takes back the states that `walk` made, after an error.
  void drop_states(const py::dict& state) {
    for (NewBuf& made : new_bufs_) drop_if_empty(state, made.param);
  }

  // grad_scale, found_inf: float32 on the device; null: none.
  void run(const at::Tensor* grad_scale, const at::Tensor* found_inf) {
    if (tensors_.empty()) return;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const cuda::Tensor from = as_cuda(plan_.items()[i]);
      cuda::Tensor& to = tensors_[i];
      to.p = from.p;
      if (to.kind != cuda::Kind::statistic) to.g = from.g;
      to.b = from.b;
      to.numel = from.numel;
      to.bits |= from.bits;
    }
    const cuda::Device device{
        .grad_scale = grad_scale == nullptr ? nullptr : grad_scale->const_data_ptr<float>(),
        .found_inf = found_inf == nullptr ? nullptr : found_inf->const_data_ptr<float>(),
        .started = on_device_.started.mutable_data_ptr<uint8_t>(),
        .ticket = reinterpret_cast<uint32_t*>(on_device_.ticket.mutable_data_ptr<int32_t>()),
    };
    if (kernel_.is_none()) {
      launch(plan_.device().index(), tensors_, groups_, device);
    } else {
      kernel_(bytes_of(tensors_), bytes_of(groups_));
    }
    plan_.write_back();
    plan_.bump_versions();
    for (const NewBuf& made : new_bufs_)
      set(made.values.ptr(), names().momentum_buffer, py::reinterpret_steal<py::object>(THPVariable_Wrap(made.buf)));
    for (const py::object& group : started_) set(group.ptr(), names().started, py::bool_(true));
  }

 private:
  struct NewBuf {
    py::object param;
    at::Tensor buf;
    py::object values;  // optimizer.state[param]
  };

  const char* walk_groups(const py::list& groups, const py::dict& state) {
    int32_t slot = 0;
    for (Py_ssize_t index = 0; index < PyList_GET_SIZE(groups.ptr()); ++index)
      if (const char* why = walk_group(index, PyList_GET_ITEM(groups.ptr(), index), state.ptr(), slot)) return why;
    return nullptr;
  }

  const char* walk_group(Py_ssize_t index, PyObject* group, PyObject* state, int32_t& slot) {
    const Names& key = names();
    reader_.hold(group);
    PyObject* list = reader_.hold(required(group, key.params));
    if (!PyList_Check(list) && !PyTuple_Check(list)) throw py::type_error("group['params'] must be a list");
    params_.clear();
    bool steps = false, all = true;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(list); ++i) {
      const Param& param = reader_.param(PySequence_Fast_GET_ITEM(list, i), params_);
      steps = steps || param.has_grad();
      all = all && param.has_grad();
    }
    const int32_t first_slot = std::exchange(slot, slot + static_cast<int32_t>(params_.size()));
    if (capturing_ && !all) return "a parameter has no gradient: replays would go on without it";
    // A group in exponential form of which this process holds no parameter follows the others' (texp/step/groups.py `steps`).
    if (!steps && !params_.empty()) return nullptr;
    const bool scale_invariant = reader_.scale_invariant(group);
    const Scale known = reader_.scale(StoredScale(group), index);  // when the state was last on the host
    const bool ordinary = !scale_invariant && known.P == 1 && known.kappa == 0;
    if (ordinary && params_.empty()) return nullptr;

    cuda::Group made{};
    bool has_momentum = true;
    if (const char* why = read_numbers(group, index, made, has_momentum)) return why;
    made.nesterov = reader_.flag(required(group, key.nesterov));
    made.maximize = reader_.flag(required(group, key.maximize));
    made.scale_invariant = scale_invariant;
    made.state = reinterpret_cast<cuda::State*>(on_device_.states.mutable_data_ptr<double>()) + index;
    made.unbuffered = !params_.empty() || !(reader_.started(group) || known != Scale{});
    if (has_momentum || !ordinary) {
      for (Param& param : params_) {
        param.buf = reader_.buffer(state, param);
        made.unbuffered = made.unbuffered && param.buf == nullptr;
      }
    }
    groups_.push_back(made);
    if (params_.empty()) {  // and no tensor brings the group to the kernel
      if (!nothing_.defined()) nothing_ = at::empty({0}, on_device_.states.options().dtype(at::kFloat));
      plan_.take(nothing_, nullptr, nullptr, kUnknownRow);
      push(cuda::Kind::statistic, 0, 0);
      if (has_momentum) started_.push_back(py::reinterpret_borrow<py::object>(group));
    }

    for (size_t i = 0; i < params_.size(); ++i) {
      const Param& param = params_[i];
      if (!param.has_grad() && ordinary) continue;
      const bool starts = has_momentum && param.has_grad() && param.buf == nullptr;
      if (const char* why = take(param, starts)) return why;
      const int flags = (param.buf != nullptr || starts ? cuda::Tensor::kBuffered : 0) | (starts ? cuda::Tensor::kFresh : 0);
      push(param.has_grad() ? cuda::Kind::stepping : cuda::Kind::idle, first_slot + static_cast<int32_t>(i), flags);
    }
    const char* wrong = nullptr;
    if (!ordinary) {
      for_each_stat(found_, index, [&](PyObject* stat, double power) {
        if (!THPVariable_CheckExact(stat) || !on_this_device(THPVariable_Unpack(stat)) ||
            plan_.take(THPVariable_Unpack(stat), nullptr, nullptr, kUnknownRow)) {
          wrong = "norm_stats are not plain tensors on its device";
        } else {
          push(cuda::Kind::statistic, 0, 0);
          tensors_.back().power = power;
        }
      });
    }
    return wrong;
  }

  // Numbers that are tensors on the device are read there when the step runs.
  const char* read_numbers(PyObject* group, Py_ssize_t index, cuda::Group& made, bool& has_momentum) {
    const Names& key = names();
    PyObject* const keys[] = {key.lr, key.momentum, key.dampening, key.weight_decay};
    cuda::Number* const numbers[] = {&made.lr, &made.momentum, &made.dampening, &made.weight_decay};
    for (int i = 0; i < 4; ++i) {
      PyObject* value = reader_.hold(required(group, keys[i]));
      if (THPVariable_CheckExact(value) && !is_on_host(THPVariable_Unpack(value))) {
        const at::Tensor& t = THPVariable_Unpack(value);
        const bool wide = t.scalar_type() == at::kDouble;
        if (t.numel() != 1 || !on_this_device(t) || (!wide && t.scalar_type() != at::kFloat))
          return "a hyperparameter is not a float32 or float64 tensor of one element on its device";
        made.in[i] = wide ? cuda::Number::In::float64 : cuda::Number::In::float32;
        numbers[i]->at = t.const_data_ptr();
      } else {
        made.in[i] = cuda::Number::In::host;
        numbers[i]->value = reader_.number(value);
        Reader::check_number(index, keys[i], numbers[i]->value);
        if (i == 1) has_momentum = numbers[i]->value != 0;
      }
    }
    return nullptr;
  }

  bool is_on_host(const at::Tensor& t) const { return t.is_cpu() && !on_this_device(t); }

  bool on_this_device(const at::Tensor& t) const { return t.device() == plan_.device(); }

  const char* take(const Param& param, bool starts) {
    if (!param.exact || !on_this_device(THPVariable_Unpack(param.object)))
      return "a parameter is not a plain tensor on its device";
    const at::Tensor& p = THPVariable_Unpack(param.object);
    at::Tensor made;
    if (param.buf != nullptr) {
      if (!THPVariable_CheckExact(param.buf)) return "a momentum buffer is not a plain tensor";
      const at::Tensor& buf = THPVariable_Unpack(param.buf);
      const at::ScalarType dtype = wide_enough(p, buf, momentum_dtype_);
      if (dtype == buf.scalar_type()) return told(plan_.take(p, param.grad, &buf, kUnknownRow));
      if (capturing_) return "a momentum buffer is narrower than it is to be; take a step before the capture";
      if (const char* why = unwritable(buf)) return told({"its momentum buffer", why});
      made = widened(buf, dtype);
    } else {
      if (!starts) return told(plan_.take(p, param.grad, nullptr, kUnknownRow));
      // Memory made in a capture would be set to 0 again by each replay.
      if (capturing_) return "a parameter has no momentum buffer yet; take a step before the capture";
      if (const char* why = unwritable(p)) return told({"the parameter", why});
      if (const char* why = unsupported(*param.grad)) return told({"its gradient", why});
      made = new_buffer(p, *param.grad, momentum_dtype_);
    }
    const Refusal refusal = plan_.take(p, param.grad, &made, kUnknownRow);
    if (!refusal) new_bufs_.push_back({py::reinterpret_borrow<py::object>(param.object), made, {}});
    return told(refusal);
  }

  // As a clause; null if there is none.
  const char* told(const Refusal& refusal) {
    if (!refusal) return nullptr;
    told_ = std::string(refusal.who) + ' ' + refusal.why;
    return told_.c_str();
  }

  void push(cuda::Kind kind, int32_t slot, int flags) {
    cuda::Tensor t{};
    t.bits = static_cast<uint8_t>(flags);
    t.slot = slot;
    t.source = static_cast<uint16_t>(groups_.size() - 1);
    t.kind = kind;
    tensors_.push_back(t);
  }

  const OnDevice on_device_;
  const MomentumDtype momentum_dtype_;
  py::object found_;  // statistics, see found_stats
  const bool capturing_;
  const py::object& kernel_;
  Reader reader_;
  Rows rows_;  // none
  Plan plan_;
  std::vector<Param> params_;  // of one group
  std::vector<cuda::Tensor> tensors_;
  std::vector<cuda::Group> groups_;
  std::vector<NewBuf> new_bufs_;
  std::vector<py::object> started_;  // groups without parameters that take a step with momentum
  at::Tensor nothing_;               // stands for those
  std::string told_;
};

}  // namespace texp
