// The module texp._C.
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "host/step.h"
#include "math/scale.h"

namespace texp {
namespace {

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

// Of (param, grad or None, buffer or None); raises ValueError, with the reason, for tensors that no kernel takes.
void take(TensorList& list, const py::iterable& entries, int32_t row) {
  const auto tensor = [](const py::handle& object) -> const at::Tensor* {
    if (object.is_none()) return nullptr;
    if (!THPVariable_CheckExact(object.ptr())) throw py::value_error("a tensor is a subclass of torch.Tensor");
    return &THPVariable_Unpack(object.ptr());
  };
  for (const py::tuple& entry : py::cast<std::vector<py::tuple>>(entries)) {
    if (tensor(entry[0])->device() != list.device()) throw py::value_error("a parameter is on another device");
    if (const Refusal refusal = list.take(*tensor(entry[0]), tensor(entry[1]), tensor(entry[2]), row))
      throw py::value_error(std::string(refusal.who) + " " + refusal.why);
  }
}

// Phase 4 of tensors on the CPU, with one row.
void apply(const py::tuple& row, const py::iterable& entries) {
  const at::NoGradGuard no_grad;
  Rows rows;
  rows.set(rows.add(), as_row(row));
  TensorList list(c10::Device(c10::kCPU));
  take(list, entries, 0);
  for (int64_t i = 0; i < list.size(); ++i)
    if (!rows.fits(0, list.entries()[i].dtypes.is_wide()))
      throw py::value_error("the parameter is too narrow for a step as large as this");
  if (list.finish()) throw py::value_error("tensors that are written to share memory");
  cpu::apply(list.entries(), list.size(), list.tiles(), rows);
  list.write_back();
  list.bump_versions();
}

// Phase 2 of each entry; texp.backends.reference.reduce defines it. stream: of a CUDA device, its address.
py::object reduce_entries(const py::iterable& entries, int reduction, const std::string& device, uintptr_t stream) {
  const at::NoGradGuard no_grad;
  TensorList list{c10::Device(device)};
  take(list, entries, 0);
  list.stream = reinterpret_cast<void*>(stream);
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(reduce(list, static_cast<Reduction>(reduction), {})));
}

// Of the structs of tables.h, their sizes and where their fields are, in bytes.
py::dict layout() {
  py::dict all;
#define TEXP_FIELD(name) of[#name] = offsetof(Struct, name);
#define TEXP_STRUCT(name, ...)  \
  {                             \
    using Struct = name;        \
    py::dict of;                \
    of["size"] = sizeof(Struct); \
    __VA_ARGS__ all[#name] = of; \
  }
#define F TEXP_FIELD
  TEXP_STRUCT(TensorEntry, F(p) F(g) F(b) F(numel) F(row) F(dtypes))
  TEXP_STRUCT(RowRequest, F(power) F(group) F(slot) F(kind) F(has_buffer) F(newly_allocated))
  TEXP_STRUCT(GroupEntry, F(lr) F(momentum) F(dampening) F(weight_decay) F(scale) F(begin) F(end) F(in) F(nesterov)
                              F(maximize) F(scale_invariant) F(without_buffers))
  TEXP_STRUCT(DeviceScale, F(P) F(kappa) F(exponent) F(momentum_initialized))
  TEXP_STRUCT(DeviceStep, F(grad_scale) F(found_inf) F(norm) F(max_norm) F(skips_nonfinite)
                              F(momentum_initialized) F(rows) F(skip))
#undef F
#undef TEXP_STRUCT
#undef TEXP_FIELD
  return all;
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
  using texp::Stepper;
  module.doc() = "The C++ core of texp; see csrc/host/step.h.";
  module.def("observed", &at::hasCallbacks, "Whether a profiler or another observer is to see the next step.");
  py::class_<Stepper>(module, "Stepper", "Takes the steps of one optimizer; see csrc/host/step.h.")
      .def(py::init<py::object, py::object, const py::object&, const py::object&>(), py::kw_only(), py::arg("check_scale"),
           py::arg("current_stream"), py::arg("cpu") = true, py::arg("cuda") = false)
      .def("step", &Stepper::step, py::arg("groups"), py::arg("norm_stats"), py::arg("state"), py::arg("grad_scale"),
           py::arg("momentum_dtype"), py::arg("check"), py::arg("clip"), py::arg("reduce_rest"))
      .def("step_on_device", &Stepper::step_on_device, py::arg("groups"), py::arg("norm_stats"), py::arg("state"),
           py::arg("momentum_dtype"), py::arg("device_state"), py::arg("grad_scale"), py::arg("found_inf"),
           py::arg("capturing"), py::arg("clip"))
      .def("apply_rows", &Stepper::apply_rows, py::arg("work"), py::arg("check"))
      .def_readonly("grad_norm", &Stepper::grad_norm)
      .def_readonly_static("FALLBACK", &Stepper::kFallback)
      .def_readonly_static("AVERAGED", &Stepper::kAveraged)
      .def_readonly_static("CAPTURING", &Stepper::kCapturing)
      .def_readonly_static("NONFINITE", &Stepper::kNonfinite);
  module.def("apply", &texp::apply, py::arg("row"), py::arg("entries"));
  module.def("reduce", &texp::reduce_entries, py::arg("entries"), py::arg("reduction"), py::arg("device") = "cpu",
             py::arg("stream") = 0);
  module.def("advance", &texp::advance_tuple, py::arg("scale"), py::arg("hyper"), py::arg("first"), py::arg("grad_scale"));
  module.def("layout", &texp::layout);
  module.def("cpu_variants", &texp::cpu_variants);
  module.def("use_cpu_variant", &texp::use_cpu_variant, py::arg("name"));
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
