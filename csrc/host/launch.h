// Giving a plan to a kernel for GPUs: that of this library, or one that is called from Python.
#pragma once

#include <c10/core/Device.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/kernels.h"
#include "tensor_list.h"

namespace texp {

inline cuda::Tensor as_cuda(const Item& item) {
  cuda::Tensor t{};
  t.p = item.p;
  t.g = item.g;
  t.b = item.b;
  t.numel = item.numel;
  t.source = static_cast<uint16_t>(item.row);
  t.bits = cuda::Tensor::bits_of(item.dtype, item.g_dtype, item.b_dtype);
  return t;
}

inline std::vector<cuda::Tensor> table_of(const Plan& plan, const Rows& rows) {
  if (rows.wide.size() > UINT16_MAX) throw std::runtime_error("a step on a GPU takes at most 65,535 different rows");
  std::vector<cuda::Tensor> tensors;
  tensors.reserve(plan.items().size());
  for (const Item& item : plan.items()) tensors.push_back(as_cuda(item));
  return tensors;
}

template <class T>
py::bytearray bytes_of(const std::vector<T>& table) {
  return {reinterpret_cast<const char*>(table.data()), table.size() * sizeof(T)};
}

// Gives a plan to a kernel that is called from Python: with the device ("cuda:0", say), a cuda::Tensor for each tensor, and
// the rows.
inline void launch(Plan& plan, const Rows& rows, py::handle kernel) {
  if (plan.items().empty()) return;
  kernel(plan.device().str(), bytes_of(table_of(plan, rows)), bytes_of(rows.wide));
  plan.write_back();
}

#if defined(TEXP_WITH_CUDA)

// The stream that torch is using on a device. Asked of Python, so that the core does not need a CUDA build of torch.
inline void* current_stream(c10::DeviceIndex device) {
  // Never given back: at the end of the process Python goes first.
  static PyObject* const ask =
      py::object(py::module_::import("texp.torch_internals").attr("current_raw_stream")).release().ptr();
  return reinterpret_cast<void*>(py::handle(ask)(device).cast<uintptr_t>());
}

inline void raise_if(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("the CUDA kernel of texp could not be launched: ") + error);
}

// Gives a plan to the CUDA kernel.
inline void launch(Plan& plan, const Rows& rows) {
  if (plan.items().empty()) return;
  const c10::DeviceIndex device = plan.device().index();
  void* stream = current_stream(device);
  if (texp_cuda_is_capturing(stream))
    throw std::runtime_error("a step with capturable=False cannot be captured in a graph: its rows are computed on the host");
  const std::vector<cuda::Tensor> tensors = table_of(plan, rows);
  raise_if(texp_cuda_step(device, stream, tensors.data(), static_cast<int64_t>(tensors.size()), rows.wide.data(), nullptr,
                          nullptr));
  plan.write_back();
}

inline void launch(c10::DeviceIndex device, const std::vector<cuda::Tensor>& tensors,
                   const std::vector<cuda::Group>& groups, const cuda::Device& on_device) {
  raise_if(texp_cuda_step(device, current_stream(device), tensors.data(), static_cast<int64_t>(tensors.size()), nullptr,
                          groups.data(), &on_device));
}

#else

inline void launch(Plan&, const Rows&) {}

inline void launch(c10::DeviceIndex, const std::vector<cuda::Tensor>&, const std::vector<cuda::Group>&, const cuda::Device&) {
  throw std::runtime_error("texp was built without its CUDA kernel");
}

#endif

}  // namespace texp
