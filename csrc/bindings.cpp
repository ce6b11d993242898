// The module texp._C.
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "host/device_walk.h"
#include "host/tensor_list.h"
#include "math/scale.h"
#include "host/gather.h"

namespace texp {
namespace {

// A walk whose memory serves the next one.
class UsedWalk {
  std::optional<Walk> own_;  // where a hook steps another optimizer meanwhile

  static Walk& kept() {
    thread_local Walk walk;
    return walk;
  }

 public:
  Walk& walk;

  UsedWalk() : walk(kept().busy ? own_.emplace() : kept()) { walk.busy = true; }
  ~UsedWalk() {
    walk.clear();
    walk.busy = false;
  }
  UsedWalk(const UsedWalk&) = delete;
};

MomentumDtype momentum_dtype_of(const py::object& dtype) {
  if (dtype.is_none()) return {};
  if (!THPDtype_Check(dtype.ptr())) throw py::type_error("momentum_dtype must be a torch.dtype or None");
  return reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
}

// Takes one step of all tensors that the kernel can take, and returns the list of the others (see Walk::left).
//
// `check` is called with that list, if it is not empty, before anything is changed; it may raise. cpu, cuda: who takes
// tensors there: False for nobody, True for the kernel of this library, or one that is called, see csrc/launch.h.
// norm_stats: a texp.step.norm_stats.NormStats. momentum_dtype: a torch.dtype or None.
py::list step(const py::list& groups, const py::dict& norm_stats, const py::dict& state, double grad_scale,
              const py::object& momentum_dtype, const py::object& check, const py::object& cpu, const py::object& cuda) {
  at::NoGradGuard no_grad;
  UsedWalk used;
  Walk& walk = used.walk;
  walk.walk(groups, norm_stats, state, grad_scale, momentum_dtype_of(momentum_dtype), Taker(cpu), Taker(cuda));
  const py::list left = walk.left();
  if (PyList_GET_SIZE(left.ptr()) != 0) check(left);
  try {
    walk.find_states(state);
    walk.run();
  } catch (...) {
    walk.drop_states(state);
    throw;
  }
  if (walk.averaged()) py::module_::import("texp.step.groups").attr("warn_of_averaging")();
  return left;
}

// Takes one step of groups whose scales are on a device. Returns why it cannot be taken in this way, and then changes
// nothing, or None. grad_scale, found_inf: float32 tensors of one element on the device, or None. capturing: whether the
// step is not taken now, but recorded in a graph. kernel: see DeviceWalk.
py::object step_on_device(const py::list& groups, const py::dict& norm_stats, const py::dict& state,
                          const py::object& momentum_dtype, const py::object& states, const py::object& started,
                          const py::object& ticket, const py::object& grad_scale, const py::object& found_inf,
                          bool capturing, const py::object& kernel) {
  at::NoGradGuard no_grad;
  const auto tensor = [](const py::object& object) { return THPVariable_Unpack(object.ptr()); };
  const auto optional = [](const py::object& object) {
    return object.is_none() ? nullptr : &THPVariable_Unpack(object.ptr());
  };
  const OnDevice on_device{tensor(states), tensor(started), tensor(ticket)};
  DeviceWalk walk(on_device, momentum_dtype_of(momentum_dtype), capturing, kernel);
  if (const char* why = walk.walk(groups, norm_stats, state)) return py::str(why);
  try {
    walk.run(optional(grad_scale), optional(found_inf));
  } catch (...) {
    walk.drop_states(state);
    throw;
  }
  return py::none();
}

// Applies rows to tensors: pairs of a row and (param, None, buffer or None). Returns the places of those that no kernel
// takes. `check` is called with them, if there are any, before anything is changed; it may raise.
std::vector<size_t> apply_rows(const std::vector<py::tuple>& work, const py::object& check, const py::object& cpu,
                               const py::object& cuda) {
  at::NoGradGuard no_grad;
  UsedWalk used;
  const std::vector<size_t> left = used.walk.walk_rows(work, Taker(cpu), Taker(cuda));
  if (!left.empty()) check(left);
  used.walk.run();
  return left;
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

// texp.backends.reference.apply for tensors that the kernel can take; raises ValueError, with the reason, for others.
void apply(const py::tuple& row, const py::iterable& entries) {
  at::NoGradGuard no_grad;
  Rows rows;
  Plan plan(rows, c10::Device(c10::kCPU));
  const int32_t index = rows.add(as_row(row));
  const auto tensor = [](const py::handle& object) -> const at::Tensor* {
    if (object.is_none()) return nullptr;
    if (!THPVariable_CheckExact(object.ptr())) throw py::value_error("a tensor is a subclass of torch.Tensor");
    return &THPVariable_Unpack(object.ptr());
  };
  for (const py::tuple& entry : py::cast<std::vector<py::tuple>>(entries)) {
    if (!tensor(entry[0])->is_cpu()) throw py::value_error("the parameter is not on the CPU");
    if (const Refusal refusal = plan.take(*tensor(entry[0]), tensor(entry[1]), tensor(entry[2]), index))
      throw py::value_error(std::string(refusal.who) + " " + refusal.why);
  }
  plan.run();
  plan.bump_versions();
}

#ifdef TEXP_WITH_CUDA
std::pair<int, const char*> cuda_devices() {
  const char* error = nullptr;
  const int count = texp_cuda_devices(&error);
  return {count, error};
}
#endif

}  // namespace
}  // namespace texp

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ core of texp; see texp/optimizer.py and csrc/host/gather.h.";
  module.def("observed", &at::hasCallbacks, "Whether a profiler or another observer is to see the next step.");
  module.def("step", &texp::step, py::arg("groups"), py::arg("norm_stats"), py::arg("state"), py::arg("grad_scale"),
             py::arg("momentum_dtype"), py::arg("check"), py::arg("cpu") = true, py::arg("cuda") = false);
  module.def("step_on_device", &texp::step_on_device, py::arg("groups"), py::arg("norm_stats"), py::arg("state"),
             py::arg("momentum_dtype"), py::arg("states"), py::arg("started"), py::arg("ticket"), py::arg("grad_scale"),
             py::arg("found_inf"), py::arg("capturing"), py::arg("kernel") = py::none());
  module.def("apply_rows", &texp::apply_rows, py::arg("work"), py::arg("check"), py::arg("cpu") = true,
             py::arg("cuda") = false);
  module.def("advance", &texp::advance_tuple, py::arg("scale"), py::arg("hyper"), py::arg("first"), py::arg("grad_scale"));
  module.def("cpu_variants", &texp::cpu_variants);
  module.def("use_cpu_variant", &texp::use_cpu_variant, py::arg("name"));
  module.def("apply", &texp::apply, py::arg("row"), py::arg("entries"));
#ifdef TEXP_WITH_CUDA
  module.attr("with_cuda") = true;
  module.def(
      "load_cuda_kernels", [](int device) { texp::raise_if(texp_cuda_load(device)); }, py::arg("device"),
      "Loads what steps with their scale on the device launch, so that the first to do so may be a capture.");
  module.def("cuda_devices", &texp::cuda_devices, py::call_guard<py::gil_scoped_release>(),
             "How many there are, or -1, and then why there is none. Loads the driver; makes no context.");
#else
  module.attr("with_cuda") = false;
#endif
}
