// As much of CUDA as csrc/cuda/kernels.cu uses, on the CPU: blocks run one after the other, the threads of a block are threads.
// What this cannot show is what the hardware does: coalescing, caches, the order of memory between blocks.
#pragma once

#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __builtin_assume(x) static_cast<void>(x)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 gridDim;
inline std::barrier<>* block_barrier;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

// A GPU would fault.
inline std::atomic<int> misaligned = 0;
extern "C" inline __attribute__((used)) int misaligned_so_far() { return misaligned; }

// Asked of every address that is read or written.
template <class T>
bool __isGlobal(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % alignof(T) != 0) ++misaligned;
  return true;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

using __half = _Float16;
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return static_cast<__half>(x); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration"; }
inline int device_now = 0, device_of_the_last_launch = -1;
extern "C" inline __attribute__((used)) int current_device() { return device_now; }
extern "C" inline __attribute__((used)) int launched_on() { return std::exchange(device_of_the_last_launch, -1); }
inline cudaError_t cudaGetDevice(int* device) {
  *device = device_now;
  return cudaSuccess;
}
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
extern "C" inline __attribute__((used)) cudaError_t cudaSetDevice(int device) {
  device_now = device;
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
inline int compiled_for = 80;
extern "C" inline __attribute__((used)) void compile_for(int version) { compiled_for = version; }
template <class T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T*) {
  attributes->ptxVersion = compiled_for;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline int launches = 0;
extern "C" inline __attribute__((used)) int launches_so_far() { return launches; }

template <class Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  if (grid.x == 0 || sizeof(std::remove_const_t<Argument>) > 32764) return last_error = cudaErrorInvalidConfiguration;
  ++launches;
  device_of_the_last_launch = device_now;
  gridDim = grid;
  std::barrier<> barrier(block.x);
  block_barrier = &barrier;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < block.x; ++t) {
    threads.emplace_back([=] {
      threadIdx = {t};
      for (unsigned b = 0; b < grid.x; ++b) {
        blockIdx = {b};
        kernel(*static_cast<std::remove_const_t<Argument>*>(arguments[0]));
        __syncthreads();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return cudaSuccess;
}

// As the other launch: the launch before it has always done its work.
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
inline int dependent_launches = 0;
extern "C" inline __attribute__((used)) int dependent_launches_so_far() { return dependent_launches; }
template <class Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Argument), Argument& argument) {
  dependent_launches += config->attrs->val.programmaticStreamSerializationAllowed;
  void* arguments[] = {&argument};
  return cudaLaunchKernel(kernel, config->gridDim, config->blockDim, arguments, 0, config->stream);
}
