// A step: gather, reduce, then whatever can fail, then advance and apply. One Stepper for each optimizer keeps what the next step
// is compared with.
#pragma once

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gather.h"
#include "launch.h"

namespace texp {

class Stepper {
 public:
  // What `step` returns, added up.
  static constexpr int kFallback = 1;   // `check` has been called, and the reference is to do what it was told
  static constexpr int kAveraged = 2;   // a group in exponential form is being averaged
  static constexpr int kCapturing = 4;  // nothing was done, since what the host computes would be in a graph for ever
  static constexpr int kNonfinite = 8;  // nothing was done, since the norm of the gradients is not finite

  double grad_norm = 0;  // of the last step on the host that clipped

  // check_scale: see Reader. current_stream: called with the index of a CUDA device; returns the address of the stream
  // that torch is using there. cpu, cuda: False, True, or a launcher (texp.kernels.launch), see Kernels.
  Stepper(py::object check_scale, py::object current_stream, const py::object& cpu, const py::object& cuda)
      : check_scale_(std::move(check_scale)), current_stream_(std::move(current_stream)), cpu_(cpu), cuda_(cuda) {}

  // Takes one step of all tensors that the kernels can take.
  //
  // `check` is called with the list of the others, if it is not empty, before anything is changed; it may raise.
  // norm_stats: a texp.step.norm_stats.NormStats. momentum_dtype: a torch.dtype or None. clip: None, or see Clip;
  // reduce_rest is then called with pairs of P and gradient of those that the kernels do not take, and returns what they
  // add to the sum of squares, or their maximum, at θ.
  int step(const py::list& groups, const py::dict& norm_stats, const py::dict& state, double grad_scale,
           const py::object& momentum_dtype, const py::object& check, const py::object& clip,
           const py::object& reduce_rest) {
    const at::NoGradGuard no_grad;
    const Used used(*this);
    Gather& found = used.gather;
    found.gather(groups, norm_stats, state, grad_scale, momentum_dtype_of(momentum_dtype), cpu_, cuda_);
    if (is_capturing(found)) return kCapturing;
    if (const auto limit = clip_of(clip)) {
      grad_norm = norm(found, limit->reduction, reduce_rest) / grad_scale;
      if (limit->skips_nonfinite && !std::isfinite(grad_norm)) return kNonfinite;
      found.multiply_gradients(clip_factor(grad_norm, limit->max_norm));
    }
    if (!found.fallback.empty()) check(fallback(found));
    with_states(found, state, [&] { apply(found); });
    for (const auto& [stored, i, starts] : found.rescaled) {
      const GroupUpdate& update = found.updates[i];
      stored.write(update.scale, update.step.scale, !found.is_held);
      if (starts) set(stored.group, name(Key::started), py::bool_(true));
    }
    return (found.fallback.empty() ? 0 : kFallback) + (found.is_averaged ? kAveraged : 0);
  }

  // Takes one step of groups whose scales are on a device. Returns None, or why it cannot be taken in this way, and then
  // nothing is changed: a text, or False where `device_state` is not of these groups, at their scales.
  // grad_scale, found_inf: float32 tensors of one element on the device, or None. clip: None, or see Clip.
  py::object step_on_device(const py::list& groups, const py::dict& norm_stats, const py::dict& state,
                            const py::object& momentum_dtype, const py::object& device_state, const py::object& grad_scale,
                            const py::object& found_inf, bool capturing, const py::object& clip) {
    const at::NoGradGuard no_grad;
    const Used used(*this);
    Gather& found = used.gather;
    const auto attribute = [&](const char* name) { return device_state.attr(name); };
    const DeviceState on_device{.object = device_state,
                                .groups = attribute("groups"),
                                .params = attribute("params"),
                                .known = attribute("known"),
                                .scales = THPVariable_Unpack(py::object(attribute("scales")).ptr()),
                                .momentum_initialized = THPVariable_Unpack(py::object(attribute("momentum_initialized")).ptr()),
                                .capturing = capturing};
    try {
      found.gather(groups, norm_stats, state, momentum_dtype_of(momentum_dtype), on_device.scales.is_cuda() ? cuda_ : cpu_,
                   on_device);
    } catch (const NotOnDevice& reason) {
      return reason.is_stale ? py::object(py::bool_(false)) : py::object(py::str(reason.why));
    }
    if (found.groups.empty()) return py::none();
    with_states(found, state, [&] { advance_and_apply(found, on_device, grad_scale, found_inf, clip); });
    for (PyObject* group : found.started) set(group, name(Key::started), py::bool_(true));
    return py::none();
  }

  // Applies rows to tensors: pairs of a row and (param, None, buffer or None). Returns the places of those that no kernel
  // takes. `check` is called with them, if there are any, before anything is changed; it may raise.
  std::vector<size_t> apply_rows(const std::vector<py::tuple>& work, const py::object& check) {
    const at::NoGradGuard no_grad;
    const Used used(*this);
    const std::vector<size_t> left = used.gather.gather_rows(work, cpu_, cuda_);
    if (!left.empty()) check(left);
    if (is_capturing(used.gather)) throw std::runtime_error("rows that the host computes cannot be captured in a graph");
    apply(used.gather);
    return left;
  }

 private:
  // A gathering whose memory serves the next one; another where a hook steps the same optimizer meanwhile.
  struct Used {
    explicit Used(Stepper& of)
        : of(of), own(of.is_busy_ ? std::make_unique<Gather>(of.check_scale_) : nullptr), gather(own ? *own : of.gather_) {
      if (!own) of.is_busy_ = true;
    }
    ~Used() {
      if (own) return;
      gather.clear();
      of.is_busy_ = false;
    }
    Used(const Used&) = delete;

    Stepper& of;
    std::unique_ptr<Gather> own;
    Gather& gather;
  };

  // Of the gradients of a step, by their norm: a tuple of these numbers.
  struct Clip {
    double max_norm;
    Reduction reduction;   // grad_squares or grad_max
    bool skips_nonfinite;  // nothing is done where the norm is not finite
  };

  static std::optional<Clip> clip_of(const py::object& given) {
    if (given.is_none()) return {};
    const auto [max_norm, reduction, skips_nonfinite] = given.cast<std::tuple<double, int, bool>>();
    return Clip{max_norm, static_cast<Reduction>(reduction), skips_nonfinite};
  }

  static MomentumDtype momentum_dtype_of(const py::object& dtype) {
    if (dtype.is_none()) return {};
    if (!THPDtype_Check(dtype.ptr())) throw py::type_error("momentum_dtype must be a torch.dtype or None");
    return reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
  }

  void* stream(const TensorList& list) const {
    return reinterpret_cast<void*>(current_stream_(list.device().index()).cast<uintptr_t>());
  }

  // Whether what the CUDA kernels of this library would launch is being captured in a graph. Finds their streams.
  bool is_capturing(Gather& found) const {
    if (cuda_.launcher) return false;
    for (const auto& list : found.on_cuda())
      if (list->size() != 0 && texp_cuda_is_capturing(list->stream = stream(*list))) return true;
    return false;
  }

  static py::object or_none(PyObject* object) {
    return py::reinterpret_borrow<py::object>(object == nullptr ? Py_None : object);
  }

  static py::object grad_of(const Param& p) {
    return p.grad == nullptr ? or_none(p.foreign_grad) : py::reinterpret_steal<py::object>(THPVariable_Wrap(*p.grad));
  }

  // (group index, why, row, param, grad, buffer or None, whether it is yet to be made) of each tensor that the kernels do
  // not take; for a tensor of norm_stats, `why` is None.
  static py::list fallback(const Gather& found) {
    py::list list;
    for (const Gather::Fallback& of : found.fallback) {
      const Param& p = of.param;
      py::object why = py::none();
      if (of.refusal) why = py::str(std::string(of.refusal.who) + " " + of.refusal.why);
      list.append(py::make_tuple(of.group, why, as_tuple(found.rows.wide[of.row]), or_none(p.object), grad_of(p), or_none(p.buf),
                                 of.kind == Kind::first));
    }
    return list;
  }

  // Makes places in optimizer.state for new buffers, runs, and puts them there; after an error it takes the places back.
  template <class F>
  static void with_states(Gather& found, const py::dict& state, const F& run) {
    try {
      for (Gather::NewBuffer& made : found.new_buffers) made.values = values_of(state, made.param);
      run();
    } catch (...) {
      for (Gather::NewBuffer& made : found.new_buffers) drop_if_empty(state, made.param);
      throw;
    }
    for (const Gather::NewBuffer& made : found.new_buffers)
      set(made.values.ptr(), momentum_buffer(), py::reinterpret_steal<py::object>(THPVariable_Wrap(made.buf)));
  }

  // Phase 2, with rows on the host: the norm of all gradients at θ, for which the device is waited for.
  double norm(Gather& found, Reduction reduction, const py::object& reduce_rest) {
    double total = 0;
    const bool is_max = reduction == Reduction::grad_max;
    const auto add = [&](double x) { total = !is_max ? total + x : x > total || std::isnan(x) ? x : total; };
    found.for_each_list([&](TensorList& list) {
      if (list.size() == 0) return;
      const py::object& launcher = list.device().is_cuda() ? cuda_.launcher : cpu_.launcher;
      if (launcher || list.releases_gil()) found.hold();
      at::Tensor sums;
      if (list.releases_gil() && !launcher) {
        const py::gil_scoped_release release;
        sums = reduce(list, reduction, launcher);
      } else {
        sums = reduce(list, reduction, launcher).cpu();
      }
      const double* of = sums.const_data_ptr<double>();
      for (int64_t i = 0; i < list.size(); ++i) {
        const TensorEntry& entry = list.entries()[i];
        const double P = found.scale_of(entry.row).P;
        if (entry.g != nullptr) add(is_max ? P * of[2 * i + 1] : P * P * of[2 * i + 1]);
      }
    });
    py::list rest;
    for (const Gather::Fallback& of : found.fallback)
      if (of.param.has_grad()) rest.append(py::make_tuple(found.scale_of(of.row).P, grad_of(of.param)));
    if (!rest.empty()) add(reduce_rest(rest).cast<double>());
    return is_max ? total : std::sqrt(total);
  }

  // Phase 4, with rows that are on the host.
  void apply(Gather& found) {
    for (auto& list : found.on_cuda()) {
      if (list->size() == 0) continue;
      if (cuda_.launcher) {
        launch(found, *list, cuda_.launcher);
      } else {
        raise_if(texp_cuda_apply(list->device().index(), list->stream, list->entries(), list->size(),
                                 found.rows.wide.data(), nullptr, nullptr));
        list->bump_versions();
      }
      list->write_back();
    }
    TensorList& list = found.on_cpu();
    if (list.size() == 0) return;
    if (cpu_.launcher) {
      launch(found, list, cpu_.launcher);
    } else if (list.releases_gil()) {
      list.hold_memory();
      list.bump_versions();  // as long as the tensors are there for certain
      const py::gil_scoped_release release;
      cpu::apply(list.entries(), list.size(), list.tiles(), found.rows);
    } else {
      cpu::apply(list.entries(), list.size(), list.tiles(), found.rows);
      list.bump_versions();
    }
    list.write_back();
  }

  static void launch(Gather& found, TensorList& list, const py::object& launcher) {
    list.bump_versions();  // as long as the tensors are there for certain
    found.hold_for_launch(list);
    launcher.attr("apply")(list.device().str(), list.version(), view_of(list.entries(), list.size()),
                           view_of(found.rows.wide));
  }

  // Phases 2, if gradients are clipped, 3 and 4 on a device.
  void advance_and_apply(Gather& found, const DeviceState& on_device, const py::object& grad_scale,
                         const py::object& found_inf, const py::object& clip) {
    TensorList& list = found.on_device();
    const py::object& launcher = list.device().is_cuda() ? cuda_.launcher : cpu_.launcher;
    if (launcher) {
      list.bump_versions();
      found.hold_for_launch(list);
      launcher.attr("step_on_device")(version_on_device(found, list), view_of(list.entries(), list.size()), view_of(found.groups),
                                      view_of(found.requests), on_device.object, grad_scale, found_inf, on_device.capturing,
                                      clip);
    } else {
      const auto given = [](const py::object& tensor) {
        return tensor.is_none() ? nullptr : THPVariable_Unpack(tensor.ptr()).const_data_ptr<float>();
      };
      const auto n_groups = static_cast<int64_t>(found.groups.size()), n = static_cast<int64_t>(found.requests.size());
      Row<double>* workspace = reinterpret_cast<Row<double>*>(workspace_of(on_device, "workspace", (n + 1) * 10));
      DeviceStep step{.grad_scale = given(grad_scale),
                      .found_inf = given(found_inf),
                      .momentum_initialized = on_device.momentum_initialized.mutable_data_ptr<uint8_t>(),
                      .rows = workspace + 1,
                      .skip = reinterpret_cast<int32_t*>(workspace)};
      const c10::DeviceIndex index = list.device().index();
      void* const stream = this->stream(list);
      if (const auto limit = clip_of(clip)) {
        const int64_t tiles = texp_cuda_reduce_workspace(list.entries(), list.size());
        double* const sums = workspace_of(on_device, "norm_workspace", 2 * n + tiles);
        double* const norm = THPVariable_Unpack(py::object(on_device.object.attr("norm")).ptr()).mutable_data_ptr<double>();
        raise_if(texp_cuda_reduce(index, stream, list.entries(), list.size(), limit->reduction, sums, sums + 2 * n));
        raise_if(texp_cuda_norm(index, stream, found.groups.data(), found.requests.data(), n, limit->reduction, sums,
                                step.grad_scale, norm));
        step.norm = norm;
        step.max_norm = limit->max_norm;
        step.skips_nonfinite = limit->skips_nonfinite;
      }
      raise_if(texp_cuda_advance(index, stream, found.groups.data(), n_groups, found.requests.data(), n, step));
      raise_if(texp_cuda_apply(index, stream, list.entries(), list.size(), nullptr, step.rows, step.skip));
      list.bump_versions();
    }
    list.write_back();
  }

  // Room for so many float64 on the device, which the state keeps for the next step, and for graphs.
  static double* workspace_of(const DeviceState& on_device, const char* name, int64_t n) {
    py::object kept = on_device.object.attr(name);
    if (kept.is_none() || THPVariable_Unpack(kept.ptr()).numel() < n) {
      kept = py::reinterpret_steal<py::object>(THPVariable_Wrap(at::empty({n}, on_device.scales.options())));
      on_device.object.attr(name) = kept;
    }
    return THPVariable_Unpack(kept.ptr()).mutable_data_ptr<double>();
  }

  // Of the tensors, groups and requests together.
  int64_t version_on_device(const Gather& found, const TensorList& list) {
    const auto same = [](const auto& a, const auto& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
    };
    if (list.version() != tensors_version_ || !same(found.groups, groups_) || !same(found.requests, requests_)) {
      ++version_on_device_;
      tensors_version_ = list.version();
      groups_ = found.groups;
      requests_ = found.requests;
    }
    return version_on_device_;
  }

  const py::object check_scale_, current_stream_;
  const Kernels cpu_, cuda_;
  Gather gather_{check_scale_};
  bool is_busy_ = false;
  int64_t version_on_device_ = 0, tensors_version_ = -1;
  std::vector<GroupEntry> groups_;  // of the last step on a device
  std::vector<RowRequest> requests_;
};

}  // namespace texp
