// The CUDA driver, loaded at run time: no toolkit is needed to build, no driver to import, and one
// binary serves machines with a GPU and without. Declares as much of its interface as we call (CUDA
// driver API reference, 13.0); the names are the driver's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace nexus {

using CudaResult = int;
using CudaAddress = unsigned long long;

constexpr CudaResult kCudaSuccess = 0;
constexpr CudaResult kCudaDeinitialized = 4;
constexpr CudaResult kCudaNotReady = 600;

struct CudaDriver {
  CudaResult (*cuInit)(unsigned flags);
  CudaResult (*cuGetErrorName)(CudaResult, const char** name);
  CudaResult (*cuGetErrorString)(CudaResult, const char** text);
  CudaResult (*cuDeviceGet)(int* device, int ordinal);
  CudaResult (*cuDevicePrimaryCtxRetain)(void** context, int device);
  CudaResult (*cuDevicePrimaryCtxRelease)(int device);
  CudaResult (*cuCtxPushCurrent)(void* context);
  CudaResult (*cuCtxPopCurrent)(void** context);
  CudaResult (*cuStreamCreate)(void** stream, unsigned flags);
  CudaResult (*cuStreamDestroy)(void* stream);
  CudaResult (*cuStreamSynchronize)(void* stream);
  CudaResult (*cuStreamWaitEvent)(void* stream, void* event, unsigned flags);
  CudaResult (*cuStreamIsCapturing)(void* stream, int* status);
  CudaResult (*cuThreadExchangeStreamCaptureMode)(int* mode);
  CudaResult (*cuEventCreate)(void** event, unsigned flags);
  CudaResult (*cuEventDestroy)(void* event);
  CudaResult (*cuEventRecord)(void* event, void* stream);
  CudaResult (*cuEventQuery)(void* event);
  CudaResult (*cuEventSynchronize)(void* event);
  CudaResult (*cuMemcpyHtoDAsync)(CudaAddress to, const void* from, size_t nbytes, void* stream);
  CudaResult (*cuMemcpyDtoHAsync)(void* to, CudaAddress from, size_t nbytes, void* stream);
  CudaResult (*cuMemcpyDtoDAsync)(CudaAddress to, CudaAddress from, size_t nbytes, void* stream);
  CudaResult (*cuMemsetD8Async)(CudaAddress at, unsigned char value, size_t nbytes, void* stream);
  CudaResult (*cuMemHostRegister)(void* at, size_t nbytes, unsigned flags);
  CudaResult (*cuMemHostUnregister)(void* at);
  // torch's: the stream that the calling thread uses on a device.
  int32_t (*current_stream)(int32_t device, void** stream);
};

// Loads it at the first call. Throws DeviceError where there is none.
const CudaDriver& cuda_driver();

// "CUDA_ERROR_OUT_OF_MEMORY (out of memory)".
std::string cuda_error_text(CudaResult result);

}  // namespace nexus
