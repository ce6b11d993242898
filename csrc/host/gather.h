// Phase 1 of a step, gather: which tensors, which gradients, which buffers, and from what their rows are to be computed;
// on the host or, where P and κ are on a device, there. It changes nothing. texp/step/gather.py says what it is to find.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <deque>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../math/scale.h"
#include "../tables.h"
#include "groups.h"
#include "tensor_list.h"

namespace texp {

// Who takes the tensors on a kind of device: nobody, the kernels of this library, or an object with methods in Python.
struct Kernels {
  bool take = false;
  py::object launcher;  // null: those of this library

  Kernels() = default;
  explicit Kernels(const py::object& given) : take(given.ptr() != Py_False) {
    if (!py::isinstance<py::bool_>(given)) launcher = given;
  }
};

// Which of a group's rows a tensor needs.
enum class Kind : uint8_t { running, first, idle, statistic };

// Phase 3 on the host, advance, of groups in a row that stand at the same point.
struct GroupUpdate {
  Scale scale;
  Hyperparameters h;
  bool first;
  Step step = {};  // once the rows are computed
  int32_t rows[3] = {-1, -1, -1};  // by Kind, where a tensor needs them

  bool is_of(const Scale& scale, const Hyperparameters& h, bool first) const {
    return this->first == first && this->scale == scale && this->h == h;
  }
};

// What the optimizer keeps on a device between steps: a texp.step.device_state.DeviceScaleState.
struct DeviceState {
  py::object object;
  py::list groups, params, known;  // what it was made for; scale_invariant, P, exponent and κ of each group
  at::Tensor scales;               // float64 [groups, 4]: DeviceScale
  at::Tensor momentum_initialized; // uint8 [params]
  bool capturing;                  // whether the step is not taken now, but recorded in a graph
};

// Why a step cannot be taken with its rows on the device.
struct NotOnDevice {
  std::string why;
  bool is_stale = false;  // since the groups are no longer those that the state was made for
};

class Gather {
 public:
  // What a kernel does not take, and what the reference is to do with it.
  struct Fallback {
    Py_ssize_t group;
    Refusal refusal;
    int32_t row;
    Kind kind;
    Param param;
  };

  // A group whose scale changes.
  struct Rescaled {
    StoredScale stored;
    int32_t update;
    bool starts;  // it has no parameters here whose buffers would tell that it has begun
  };

  struct NewBuffer {
    PyObject* param;
    at::Tensor buf;
    py::object values;  // optimizer.state[param]
  };

  struct RowSource {
    int32_t update;
    Kind kind;
    double power;  // of a statistic
  };

  // Sums of a list's tensors, as reduce leaves them.
  using Sums = std::vector<std::pair<TensorList*, at::Tensor>>;

  explicit Gather(py::object check_scale) : reader_(std::move(check_scale)) {}

  Rows rows;
  std::vector<GroupUpdate> updates;
  std::vector<RowSource> row_sources;
  std::vector<Rescaled> rescaled;
  std::vector<NewBuffer> new_buffers;  // of parameters that take their first step, or whose buffers are too narrow
  std::vector<Fallback> fallback;
  std::vector<GroupEntry> groups;      // with rows on a device
  std::vector<RowRequest> requests;
  std::vector<PyObject*> started;      // groups without parameters that take a step with momentum there
  bool has_trust = false;    // a group's rows depend on the norms of its tensors
  bool is_averaged = false;  // a group in exponential form has the LR of SWALR: somebody averages its weights
  bool is_held = false;  // everything is kept alive, so that Python code may run

  // For rows on the host. cpu, cuda: who takes the tensors there.
  void gather(const py::list& param_groups, const py::object& norm_stats, const py::dict& state, double grad_scale,
              const MomentumDtype& momentum_dtype, const Kernels& cpu, const Kernels& cuda) {
    start(param_groups, norm_stats, state, momentum_dtype, cpu, cuda, nullptr);
    grad_scale_ = grad_scale;
    gather_groups(false);
    if (!all_rows_fit()) {
      const Rows known = rows;
      known_rows_ = &known;
      drop();
      gather_groups(true);
      known_rows_ = nullptr;
    }
    if (finish()) {
      drop();
      gather_groups(true);
      finish();
    }
    // From here on Python code may run: what is left to the reference is looked at, or state is made for new buffers.
    if (!fallback.empty() || !new_buffers.empty()) hold();
  }

  // For rows on a device, whose kernels are `kernels`; throws NotOnDevice.
  void gather(const py::list& param_groups, const py::object& norm_stats, const py::dict& state,
              const MomentumDtype& momentum_dtype, const Kernels& kernels, const DeviceState& device) {
    const bool is_cuda = device.scales.is_cuda();
    start(param_groups, norm_stats, state, momentum_dtype, is_cuda ? Kernels() : kernels,
          is_cuda ? kernels : Kernels(), &device);
    gather_groups(false);
    if (finish()) throw NotOnDevice{"parameters, buffers or norm_stats share memory"};
    if (!new_buffers.empty() || !started.empty()) hold();
  }

  // For rows that are given: pairs of a row and (param, None, buffer or None). Returns the places of those that the
  // kernels do not take.
  std::vector<size_t> gather_rows(const std::vector<py::tuple>& work, const Kernels& cpu, const Kernels& cuda) {
    cpu_ = cpu;
    cuda_ = cuda;
    is_watched_ = c10::impl::TorchDispatchModeTLS::any_modes_set();
    std::vector<size_t> left;
    PyObject* last = nullptr;
    for (size_t i = 0; i < work.size(); ++i) {
      const py::object row = work[i][0];
      const py::tuple entry = work[i][1];
      if (row.ptr() != last) rows.set(rows.add(), as_row(row));
      last = row.ptr();
      PyObject *p = entry[0].ptr(), *b = entry[2].ptr();
      const bool is_plain = THPVariable_CheckExact(p) && (b == Py_None || THPVariable_CheckExact(b)) && !is_watched_;
      TensorList* list = is_plain ? list_of(THPVariable_Unpack(p).device()) : nullptr;
      if (list == nullptr || !takes(*list, THPVariable_Unpack(p), b == Py_None ? nullptr : &THPVariable_Unpack(b)))
        left.push_back(i);
    }
    if (finish()) {
      for_each_list([](TensorList& list) { list.start(); });
      left.resize(work.size());
      std::iota(left.begin(), left.end(), size_t{0});
    }
    for_each_list([](TensorList& list) { list.hold(); });
    return left;
  }

  // Makes the rows again, for gradients that are multiplied by this. Whether a row changes nothing does not depend on it.
  void multiply_gradients(double factor) {
    grad_scale_ /= factor;
    make_rows();
  }

  // Gives the tensors of groups with trust ratios, which have rows of their own, those that follow from their sums.
  void multiply_by_trust(const Sums& sums) {
    for (const auto& [list, of_list] : sums) {
      const double* const of = of_list.const_data_ptr<double>();
      for (int64_t i = 0; i < list->size(); ++i) {
        const int32_t row = list->entries()[i].row;
        const Hyperparameters& h = updates[row_sources[row].update].h;
        if (!h.trust.is_used) continue;
        const double ratio = trust_ratio(h, std::sqrt(of[2 * i]), std::sqrt(of[2 * i + 1]) / std::abs(grad_scale_));
        rows.set(row, with_ratio(rows.wide[row], ratio));
      }
    }
  }

  // What gradients are divided by.
  double grad_scale() const { return grad_scale_; }

  // Of the group that a row is for.
  const Scale& scale_of(int32_t row) const { return updates[row_sources[row].update].scale; }

  // Keeps everything that Python code may drop.
  void hold() {
    hold_groups();
    for_each_list([](TensorList& list) { list.hold(); });
    for (const NewBuffer& made : new_buffers) keep(made.param);
    for (Fallback& of : fallback) {
      keep(of.param.object);
      if (of.param.grad != nullptr) of.param.grad = &grads_of_fallback_.emplace_back(*of.param.grad);
      if (of.param.buf != nullptr) keep(of.param.buf);
    }
  }

  // Keeps what a launcher, which is Python code, may drop; the tensors themselves are not needed after it.
  void hold_for_launch(TensorList& list) {
    list.hold_memory();
    if (!is_held) hold_groups();
  }

  // Forgets everything, but keeps the memory, and what the next step is compared with.
  void clear() {
    drop();
    for_each_list([](TensorList& list) { list.start(); });
    reader_.drop();
    found_ = norm_stats_ = param_groups_ = state_ = {};
    device_ = nullptr;
  }

  template <class F>
  void for_each_list(const F& f) {
    f(on_cpu_);
    for (auto& list : on_cuda_) f(*list);
  }

  TensorList& on_cpu() { return on_cpu_; }
  std::vector<std::unique_ptr<TensorList>>& on_cuda() { return on_cuda_; }
  TensorList& on_device() { return *list_of(device_->scales.device()); }

 private:
  // Thrown where a group holds norm_stats that the optimizer has not taken over yet.
  struct GivesNormStats {};

  void start(const py::list& param_groups, const py::object& norm_stats, const py::dict& state,
             const MomentumDtype& momentum_dtype, const Kernels& cpu, const Kernels& cuda, const DeviceState* device) {
    param_groups_ = param_groups;
    norm_stats_ = norm_stats;
    state_ = state;
    momentum_dtype_ = momentum_dtype;
    cpu_ = cpu;
    cuda_ = cuda;
    device_ = device;
    scales_ = device == nullptr ? nullptr : reinterpret_cast<DeviceScale*>(device->scales.mutable_data_ptr<double>());
    is_watched_ = c10::impl::TorchDispatchModeTLS::any_modes_set();
    known_rows_ = nullptr;
    for_each_list([](TensorList& list) { list.start(); });
    found_ = PyDict_GET_SIZE(norm_stats.ptr()) == 0 ? py::object() : norm_stats.attr("found")(param_groups);
  }

  // Forgets what was gathered, to gather it again.
  void drop() {
    for_each_list([](TensorList& list) { list.drop(); });
    clear_found();
  }

  void clear_found() {
    rows.clear();
    updates.clear();
    row_sources.clear();
    row_keeps_.clear();
    rescaled.clear();
    new_buffers.clear();
    fallback.clear();
    groups.clear();
    requests.clear();
    started.clear();
    objects_.clear();
    grads_of_fallback_.clear();
    usual_list_ = nullptr;
    slot_ = 0;
    is_held = is_averaged = has_trust = false;
  }

  void gather_groups(bool on_slow_path) {
    clear_found();
    reader_.start(state_.ptr(), on_slow_path);
    is_held = reader_.slow_path;
    try {
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(param_groups_.ptr()); ++i)
        gather_group(i, PyList_GET_ITEM(param_groups_.ptr(), i));
    } catch (const NeedsSlowPath&) {
      drop();
      return gather_groups(true);
    } catch (const GivesNormStats&) {
      drop();
      found_ = norm_stats_.attr("found")(param_groups_);
      return gather_groups(on_slow_path);
    }
    if (device_ == nullptr) {
      advance();
    } else if (PyList_GET_SIZE(device_->groups.ptr()) != PyList_GET_SIZE(param_groups_.ptr()) ||
               PyList_GET_SIZE(device_->params.ptr()) != slot_) {
      throw NotOnDevice{"", true};
    }
  }

  void gather_group(Py_ssize_t index, PyObject* group) {
    const Options& options = reader_.options(group, index);
    if (options[Key::norm_stats] != nullptr && !found_) throw GivesNormStats{};
    const std::span<PyObject*> list = reader_.params(options);
    const StoredScale stored(options);
    const bool scale_invariant = reader_.flag(options[Key::scale_invariant]);
    const bool on_device = device_ != nullptr;
    if (!on_device && !scale_invariant && stored.P == nullptr) return gather_ordinary(index, options, list);
    params_.clear();
    bool steps = false, all = true;
    for (PyObject* object : list) {
      Param& param = params_.emplace_back();
      reader_.read(object, param);
      const bool has_grad = param.has_grad();
      steps = steps || has_grad;
      all = all && has_grad;
    }
    const int32_t first_slot = slot_;
    slot_ += static_cast<int32_t>(list.size());
    if (on_device) {
      if (!is_known(options, stored, scale_invariant, index, first_slot)) throw NotOnDevice{"", true};
      if (device_->capturing && !all) throw NotOnDevice{"a parameter has no gradient: replays would go on without it"};
    }
    // A group in exponential form of which this process holds no parameter follows the others' (texp/step/groups.py).
    const bool is_empty = list.empty();
    if (!steps && !is_empty) return;

    const Scale scale = reader_.scale(stored, index);  // on the device: when it was last on the host
    const bool is_ordinary = !scale_invariant && scale.P == 1 && scale.kappa == 0;
    if (is_ordinary && is_empty) return;
    if (is_ordinary && !on_device) return gather_ordinary(index, options, list);
    if (!is_ordinary && options[Key::trust_coeff] != nullptr)
      throw py::value_error("parameter group " + std::to_string(index) +
                            ": LARS takes no group in exponential form, whose weights are as large as its schedule says");
    GroupEntry entry{};
    if (on_device) {
      read_hyperparameters(options, index, entry);
      has_trust = has_trust || entry.trust.is_used;
    }
    const bool has_momentum = on_device ? entry.in[1] != Number::In::host || entry.momentum.value != 0
                                        : reader_.hyperparameters(options, index).momentum != 0;
    bool without_buffers = !is_empty || !(reader_.flag(options[Key::started]) || scale != Scale{});
    if (has_momentum || !is_ordinary) {
      for (Param& param : params_) {
        if (is_ordinary && !param.has_grad()) continue;
        param.buf = reader_.buffer(param);
        without_buffers = without_buffers && param.buf == nullptr;
      }
    }
    int32_t update = -1;
    if (on_device) {
      entry.without_buffers = without_buffers;
      entry.scale = scales_ + index;
      entry.begin = static_cast<int32_t>(requests.size());
      if (is_empty && has_momentum) started.push_back(group);
    } else {
      update = update_of(reader_.hyperparameters(options, index), scale, without_buffers);
      rescaled.push_back({stored, update, is_empty && has_momentum});
    }

    for (size_t i = 0; i < params_.size(); ++i) {
      const Param& param = params_[i];
      if (!param.has_grad() && is_ordinary) continue;
      const Kind kind = kind_of(param, has_momentum);
      take(index, param, kind, on_device ? request(kind, param, first_slot + i) : row_of(update, kind));
    }
    if (!is_ordinary && found_) gather_statistics(index, update);
    if (!is_ordinary && options[Key::swa_lr] != nullptr) is_averaged = true;
    if (on_device) {
      entry.end = static_cast<int32_t>(requests.size());
      groups.push_back(entry);
    }
  }

  // With rows on the host, in one pass: no row depends on what comes behind its tensor, nor on whether this is the
  // group's first step.
  void gather_ordinary(Py_ssize_t index, const Options& options, std::span<PyObject*> list) {
    bool has_momentum = false, own_rows = false;
    int32_t update = -1;  // until the first gradient: without one the group does not step
    for (PyObject* object : list) {
      Param param;
      reader_.read(object, param);
      if (!param.has_grad()) continue;
      if (update < 0) {
        const Hyperparameters& h = reader_.hyperparameters(options, index);
        has_momentum = h.momentum != 0;
        update = update_of(h, Scale{}, false);
        own_rows = h.trust.is_used;
        has_trust = has_trust || own_rows;
      }
      if (has_momentum) param.buf = reader_.buffer(param);
      const Kind kind = kind_of(param, has_momentum);
      take(index, param, kind, own_rows ? new_row({update, kind, 0}) : row_of(update, kind));
    }
  }

  static Kind kind_of(const Param& param, bool has_momentum) {
    if (!param.has_grad()) return Kind::idle;
    return param.buf == nullptr && has_momentum ? Kind::first : Kind::running;
  }

  void gather_statistics(Py_ssize_t index, int32_t update) {
    PyObject* stats = PyList_GET_ITEM(found_.ptr(), index);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(stats); ++i) {
      PyObject* pair = PyList_GET_ITEM(stats, i);
      PyObject* stat = PyTuple_GET_ITEM(pair, 0);
      const double power = PyFloat_AS_DOUBLE(PyTuple_GET_ITEM(pair, 1));
      const Param param{.object = stat, .exact = THPVariable_CheckExact(stat)};
      if (device_ != nullptr && (!param.exact || THPVariable_Unpack(stat).device() != device_->scales.device()))
        throw NotOnDevice{"norm_stats are not plain tensors on its device"};
      int32_t row;
      if (device_ == nullptr) {
        row = new_row({update, Kind::statistic, power});
      } else {
        row = request(Kind::statistic, param, 0);
        requests.back().power = power;
      }
      if (take_or_refuse(param, Kind::statistic, row)) {
        if (device_ != nullptr) throw NotOnDevice{"norm_stats are not plain tensors on its device"};
        fallback.push_back({index, {}, row, Kind::statistic, param});
      }
    }
  }

  int32_t update_of(const Hyperparameters& h, const Scale& scale, bool first) {
    if (updates.empty() || !updates.back().is_of(scale, h, first))
      updates.push_back({.scale = scale, .h = h, .first = first});
    return static_cast<int32_t>(updates.size()) - 1;
  }

  int32_t row_of(int32_t update, Kind kind) {
    int32_t& row = updates[update].rows[static_cast<int>(kind)];
    if (row < 0) row = new_row({update, kind, 0});
    return row;
  }

  int32_t new_row(const RowSource& source) {
    row_sources.push_back(source);
    return rows.add();
  }

  // The row of tensor i on a device is row i.
  int32_t request(Kind kind, const Param& param, size_t slot) {
    RowRequest request{};
    request.group = static_cast<int32_t>(groups.size());
    request.slot = static_cast<int32_t>(slot);
    request.kind = kind == Kind::idle ? RowKind::idle : kind == Kind::statistic ? RowKind::statistic : RowKind::step;
    request.newly_allocated = kind == Kind::first;
    request.has_buffer = param.buf != nullptr || kind == Kind::first;
    requests.push_back(request);
    return static_cast<int32_t>(requests.size()) - 1;
  }

  // Phase 3 on the host: P, κ and every row. Tensors that their rows leave as they are are taken out.
  void advance() {
    if (!make_rows()) return;
    for_each_list([&](TensorList& list) { list.remove_if([&](int32_t row) { return row_keeps_[row]; }); });
    std::erase_if(fallback, [&](const Fallback& of) { return row_keeps_[of.row]; });
  }

  // Returns whether there are rows that change nothing.
  bool make_rows() {
    for (GroupUpdate& update : updates) update.step = texp::advance(update.scale, update.h, update.first, grad_scale_);
    row_keeps_.assign(row_sources.size(), false);
    bool any_keeps = false;
    for (size_t i = 0; i < row_sources.size(); ++i) {
      const RowSource& source = row_sources[i];
      const Step& step = updates[source.update].step;
      Row<double> row = source.kind == Kind::running ? step.running : source.kind == Kind::first ? step.first : step.idle;
      if (source.kind == Kind::statistic) {
        row = {};
        row.s_p = power_of(step.growth, source.power);
        row_keeps_[i] = step.growth == 1;
      } else if (source.kind == Kind::idle) {
        row_keeps_[i] = row == kKeep;
      }
      any_keeps = any_keeps || row_keeps_[i];
      rows.set(static_cast<int32_t>(i), row);
    }
    return any_keeps;
  }

  bool all_rows_fit() const {
    for (size_t i = 0; i < row_sources.size(); ++i)
      if (!rows.narrow[i].is_finite()) return false;
    return true;
  }

  bool finish() {
    bool shared = false;
    for_each_list([&](TensorList& list) { shared = list.finish() || shared; });
    return shared;
  }

  // Whether a kernel takes a tensor, by the row that was added last.
  bool takes(TensorList& list, const at::Tensor& p, const at::Tensor* b) {
    const auto row = static_cast<int32_t>(rows.wide.size()) - 1;
    return rows.fits(row, dtypes_of(p, nullptr, b).is_wide()) && !list.take(p, nullptr, b, row);
  }

  // Inlined, so that what the usual tensor is asked for does not pass through memory.
  TEXP_INLINE void take(Py_ssize_t index, const Param& param, Kind kind, int32_t row) {
    if (usual_list_ != nullptr && kind != Kind::first && param.exact &&
        (param.buf == nullptr || THPVariable_CheckExact(param.buf)) &&
        usual_list_->take_usual(THPVariable_Unpack(param.object), param.grad,
                                param.buf == nullptr ? nullptr : &THPVariable_Unpack(param.buf), row))
      return;
    take_unusual(index, Param(param), kind, row);
  }

  [[gnu::noinline]] void take_unusual(Py_ssize_t index, const Param& param, Kind kind, int32_t row) {
    const Refusal refusal = take_or_refuse(param, kind, row);
    if (!refusal) return;
    if (device_ != nullptr) throw NotOnDevice{std::string(refusal.who) + ' ' + refusal.why};
    fallback.push_back({index, refusal, row, kind, param});
  }

  Refusal take_or_refuse(const Param& param, Kind kind, int32_t row) {
    if (is_watched_)
      return {"the parameter", "is stepped under a TorchDispatchMode, which is to see what happens to it"};
    if (!param.exact) return {"the parameter", "is a subclass of torch.Tensor"};
    const at::Tensor& p = THPVariable_Unpack(param.object);
    TensorList* const list = list_of(p.device());
    if (known_rows_ == nullptr && !momentum_dtype_) usual_list_ = list;
    if (list == nullptr)
      return {"the parameter", "is on a device whose kernel is not asked for or cannot be used here"};
    if (param.buf != nullptr && !THPVariable_CheckExact(param.buf)) return {"its momentum buffer", "is not a torch.Tensor"};
    const at::Tensor* buf = param.buf == nullptr ? nullptr : &THPVariable_Unpack(param.buf);
    if (known_rows_ != nullptr && !known_rows_->fits(row, dtypes_of(p, param.grad, buf).is_wide()))
      return {"the parameter", "is too narrow for a step as large as this"};
    const bool is_wide_enough = buf == nullptr || wide_enough(p, *buf, momentum_dtype_) == buf->scalar_type();
    return kind != Kind::first && is_wide_enough ? list->take(p, param.grad, buf, row)
                                                 : take_with_new_buffer(*list, param, row);
  }

  // For a tensor's first step, or one whose buffer is narrower than it is to be.
  [[gnu::noinline]] Refusal take_with_new_buffer(TensorList& list, const Param& param, int32_t row) {
    const at::Tensor& p = THPVariable_Unpack(param.object);
    const bool capturing = device_ != nullptr && device_->capturing;
    at::Tensor made;
    if (param.buf != nullptr) {
      if (capturing) return {"a momentum buffer", "is narrower than it is to be; take a step before the capture"};
      const at::Tensor& buf = THPVariable_Unpack(param.buf);
      if (const char* why = unwritable(buf)) return {"its momentum buffer", why};
      made = widened(buf, wide_enough(p, buf, momentum_dtype_));
    } else {
      // Memory made in a capture would be set to 0 again by each replay.
      if (capturing) return {"a parameter", "has no momentum buffer yet; take a step before the capture"};
      if (const char* why = unwritable(p)) return {"the parameter", why};
      if (const char* why = unsupported(*param.grad)) return {"its gradient", why};
      made = new_buffer(p, *param.grad, momentum_dtype_);
    }
    const Refusal refusal = list.take(p, param.grad, &made, row);
    if (!refusal) new_buffers.push_back({param.object, made, {}});
    return refusal;
  }

  // Whether the state on the device is of this group, at its scale. What it was made for it holds, so that the same
  // address is the same object.
  bool is_known(const Options& options, const StoredScale& stored, bool scale_invariant, Py_ssize_t index,
                int32_t first_slot) {
    if (index >= PyList_GET_SIZE(device_->groups.ptr()) || slot_ > PyList_GET_SIZE(device_->params.ptr())) return false;
    if (PyList_GET_ITEM(device_->groups.ptr(), index) != options.group) return false;
    for (size_t i = 0; i < params_.size(); ++i)
      if (PyList_GET_ITEM(device_->params.ptr(), first_slot + static_cast<Py_ssize_t>(i)) != params_[i].object) return false;
    PyObject* known = PyList_GET_ITEM(device_->known.ptr(), index);
    const Scale scale = reader_.unchecked_scale(stored);
    return reader_.flag(PyTuple_GET_ITEM(known, 0)) == scale_invariant &&
           reader_.number(PyTuple_GET_ITEM(known, 1)) == scale.P &&
           PyLong_AsLongLong(PyTuple_GET_ITEM(known, 2)) == scale.exponent &&
           reader_.number(PyTuple_GET_ITEM(known, 3)) == scale.kappa;
  }

  // Numbers that are tensors on the device are read there when the step runs.
  void read_hyperparameters(const Options& options, Py_ssize_t index, GroupEntry& entry) {
    if (reader_.is_as_before(options)) {
      entry = groups.back();
      return;
    }
    entry.nesterov = reader_.flag(options.required(Key::nesterov));
    entry.maximize = reader_.flag(options.required(Key::maximize));
    entry.scale_invariant = reader_.flag(options[Key::scale_invariant]);
    entry.trust = reader_.trust(options, index);
    Number* const numbers[] = {&entry.lr, &entry.momentum, &entry.dampening, &entry.weight_decay};
    for (int i = 0; i < 4; ++i) {
      const Key key = Key(static_cast<int>(Key::lr) + i);
      PyObject* value = options.required(key);
      const at::Tensor* t = THPVariable_CheckExact(value) ? &THPVariable_Unpack(value) : nullptr;
      if (t == nullptr || (t->is_cpu() && !device_->scales.is_cpu())) {
        entry.in[i] = Number::In::host;
        numbers[i]->value = reader_.finite(options, key, index);
        continue;
      }
      const bool is_wide = t->scalar_type() == at::kDouble;
      if (t->numel() != 1 || t->device() != device_->scales.device() || (!is_wide && t->scalar_type() != at::kFloat))
        throw NotOnDevice{"a hyperparameter is not a float32 or float64 tensor of one element on its device"};
      entry.in[i] = is_wide ? Number::In::float64 : Number::In::float32;
      numbers[i]->at = t->const_data_ptr();
    }
    reader_.was_read(options);
  }

  void keep(PyObject* object) { objects_.push_back(py::reinterpret_borrow<py::object>(object)); }

  void hold_groups() {
    is_held = true;
    for (const Rescaled& of : rescaled) keep(of.stored.group);
    for (PyObject* group : started) keep(group);
  }

  // Null: tensors there are not taken.
  TensorList* list_of(c10::Device device) {
    if (device_ != nullptr && device != device_->scales.device()) throw NotOnDevice{"a parameter is not a plain tensor on its device"};
    if (device.is_cpu()) return cpu_.take ? &on_cpu_ : nullptr;
    if (!device.is_cuda() || !cuda_.take) return nullptr;
    for (auto& list : on_cuda_)
      if (list->device() == device) return list.get();
    return on_cuda_.emplace_back(std::make_unique<TensorList>(device)).get();
  }

  Reader reader_;
  py::object param_groups_, norm_stats_, state_;
  py::object found_;  // the statistics of each group and their powers of P, if any group has some
  MomentumDtype momentum_dtype_;
  Kernels cpu_, cuda_;
  const DeviceState* device_ = nullptr;  // null: rows are computed on the host
  DeviceScale* scales_ = nullptr;        // by group, there
  double grad_scale_ = 1;
  TensorList on_cpu_{c10::Device(c10::kCPU)};
  std::vector<std::unique_ptr<TensorList>> on_cuda_;
  std::vector<Param> params_;   // of one group
  std::vector<char> row_keeps_; // whether a row changes nothing
  std::vector<py::object> objects_;  // kept alive
  std::deque<at::Tensor> grads_of_fallback_;
  TensorList* usual_list_ = nullptr;  // that of the tensor before, if such are taken there as they are; null: look closely
  const Rows* known_rows_ = nullptr;  // when everything is gathered again because not all of them fit
  int32_t slot_ = 0;
  bool is_watched_ = false;  // by a TorchDispatchMode
};

}  // namespace texp
