// Giving tensors and rows to the kernels: those of this library, or a launcher in Python.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/core/Device.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/kernels.h"
#include "tensor_list.h"

namespace texp {

namespace py = pybind11;

template <class T>
py::memoryview view_of(const T* table, size_t n) {
  return py::memoryview::from_memory(static_cast<const void*>(table), static_cast<py::ssize_t>(n * sizeof(T)));
}

template <class T>
py::memoryview view_of(const std::vector<T>& table) {
  return view_of(table.data(), table.size());
}

inline void raise_if(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("the CUDA kernel of texp could not be launched: ") + error);
}

#if !defined(TEXP_WITH_CUDA)
// Kernels are then never asked for.
extern "C" {
inline const char* texp_cuda_apply(int, void*, const TensorEntry*, int64_t, const Row<double>*, const Row<double>*,
                                   const int32_t*) {
  return "texp was built without it";
}
inline const char* texp_cuda_advance(int, void*, const GroupEntry*, int64_t, const RowRequest*, int64_t, const DeviceStep&) {
  return "texp was built without it";
}
inline const char* texp_cuda_reduce(int, void*, const TensorEntry*, int64_t, Reduction, double*, double*) {
  return "texp was built without it";
}
inline const char* texp_cuda_norm(int, void*, const GroupEntry*, const RowRequest*, int64_t, Reduction, const double*,
                                  const float*, double*) {
  return "texp was built without it";
}
inline int64_t texp_cuda_reduce_workspace(const TensorEntry*, int64_t) { return 0; }
inline bool texp_cuda_is_capturing(void*) { return false; }
}
#endif

// Phase 2, reduce: float64 [n, 2], where the tensors are. launcher: null: the kernels of this library.
inline at::Tensor reduce(const TensorList& list, Reduction reduction, const py::object& launcher) {
  if (launcher)
    return THPVariable_Unpack(
        launcher.attr("reduce")(list.device().str(), view_of(list.entries(), list.size()), static_cast<int>(reduction)).ptr());
  const auto room = [&](int64_t n) {
    return at::empty({n, 2}, at::TensorOptions().dtype(at::kDouble).device(list.device()));
  };
  const at::Tensor sums = room(list.size());
  double* const to = sums.mutable_data_ptr<double>();
  if (list.device().is_cpu()) {
    cpu::reduce(list.entries(), list.size(), reduction, to);
  } else {
    const at::Tensor workspace = room((texp_cuda_reduce_workspace(list.entries(), list.size()) + 1) / 2);
    raise_if(texp_cuda_reduce(list.device().index(), list.stream, list.entries(), list.size(), reduction, to,
                              workspace.mutable_data_ptr<double>()));
  }
  return sums;
}

}  // namespace texp
