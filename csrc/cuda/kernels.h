// The CUDA kernels as C functions: the host side, which knows torch, calls them; the kernels know nothing of torch.
//
// Each launches on a stream of the given device, whichever device is current, and waits for nothing. The tables on the
// host are copied into the launches; memory on the device must stay until the stream has passed. Each returns null, or
// what CUDA says went wrong; then not all launches took place.
#pragma once

#include <cstdint>

#include "../tables.h"

extern "C" {

// Applies to each tensor its row. Either `rows` (on the host) or `device_rows` is not null, and TensorEntry::row is an
// index into it. With device_rows, which advance has just written, nothing is changed where *skip, in device memory, is
// not 0.
const char* texp_cuda_apply(int device, void* stream, const texp::TensorEntry* tensors, int64_t n,
                            const texp::Row<double>* rows, const texp::Row<double>* device_rows, const int32_t* skip);

// Computes the row of each request, and advances the scale of each group. The requests of one group stand behind those
// of the group before it; a group may have none.
const char* texp_cuda_advance(int device, void* stream, const texp::GroupEntry* groups, int64_t n_groups,
                              const texp::RowRequest* requests, int64_t n, const texp::DeviceStep& step);

// sums[2·i] = ‖p‖² and sums[2·i + 1] = ‖g‖² of tensor i, 0 where there is no g, in float64; of a reduction that does not
// read p, sums[2·i] is left as it is. The order of all sums is fixed, so every run gives the same bits. `sums` and
// `workspace` are in device memory.
const char* texp_cuda_reduce(int device, void* stream, const texp::TensorEntry* tensors, int64_t n,
                             texp::Reduction reduction, double* sums, double* workspace);

// How many float64 the workspace must hold.
int64_t texp_cuda_reduce_workspace(const texp::TensorEntry* tensors, int64_t n);

// *norm = the norm of all gradients at θ: those of tensor i, of which `reduce` has left sums[2·i + 1], times the P of
// the group of request i, divided by *grad_scale (null: 1). reduction: grad_squares or grad_max. Before `advance`, which
// changes P.
const char* texp_cuda_norm(int device, void* stream, const texp::GroupEntry* groups, const texp::RowRequest* requests,
                           int64_t n, texp::Reduction reduction, const double* sums, const float* grad_scale,
                           double* norm);

// Loads the kernels that a capture may launch: otherwise their first launch does, which a capture does not allow.
const char* texp_cuda_load(int device);

// Whether what is launched on the stream is being captured in a graph.
bool texp_cuda_is_capturing(void* stream);

// How many devices there are, or −1, and then `error` says why there is none.
int texp_cuda_devices(const char** error);
}
