#pragma once
#include <cstdint>
#include "../tables.h"
extern "C" {
const char* texp_cuda_apply(int device, void* stream, const texp::TensorEntry* tensors, int64_t n, const texp::Row<double>* rows, const texp::Row<double>* device_rows, const int32_t* skip);
const char* texp_cuda_advance(int device, void* stream, const texp::GroupEntry* groups, int64_t n_groups, const texp::RowRequest* requests, int64_t n, const texp::DeviceStep& step);
const char* texp_cuda_reduce(int device, void* stream, const texp::TensorEntry* tensors, int64_t n, double* sums, double* workspace);
int64_t texp_cuda_reduce_workspace(const texp::TensorEntry* tensors, int64_t n);
const char* texp_cuda_load(int device_index);
bool texp_cuda_is_capturing(void* stream);
int texp_cuda_devices(const char** error);
}
