// Giving tensors and rows to the kernels of a GPU: those of this library, or a launcher in Python.
#pragma once

#include <c10/core/Device.h>
#include <pybind11/pybind11.h>

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
inline const char* texp_cuda_reduce(int, void*, const TensorEntry*, int64_t, double*, double*) {
  return "texp was built without it";
}
inline int64_t texp_cuda_reduce_workspace(const TensorEntry*, int64_t) { return 0; }
inline bool texp_cuda_is_capturing(void*) { return false; }
}
#endif

}  // namespace texp
