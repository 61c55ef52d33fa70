#include "device/cuda_driver.h"

#include <dlfcn.h>

#include "common/error.h"

namespace nexus {
namespace {

void* find(void* library, const char* name) {
  void* found = dlsym(library, name);
  if (found == nullptr) {
    fail("DeviceError", "Streaming to CUDA needs a driver of CUDA 12 or newer; libcuda.so.1 lacks ",
         name, ". Update the driver.");
  }
  return found;
}

template <typename Function>
void bind(Function*& function, void* library, const char* name) {
  function = reinterpret_cast<Function*>(find(library, name));
}

// torch lets C programs ask for its current stream; the library is loaded where torch has CUDA.
void* find_current_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  if (void* found = dlsym(RTLD_DEFAULT, kName)) return found;
  void* torch = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  void* found = torch == nullptr ? nullptr : dlsym(torch, kName);
  if (found == nullptr) {
    fail("DeviceError",
         "Streaming to CUDA needs a torch built with CUDA; the one that is loaded is not. Install "
         "one from https://pytorch.org.");
  }
  return found;
}

CudaDriver load() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  if (library == nullptr) {
    fail("DeviceError",
         "Streaming to CUDA needs an NVIDIA driver; it cannot be loaded: ", dlerror(),
         ". Use device=\"cpu\" on this machine.");
  }
  CudaDriver driver;
  bind(driver.cuInit, library, "cuInit");
  bind(driver.cuGetErrorName, library, "cuGetErrorName");
  bind(driver.cuGetErrorString, library, "cuGetErrorString");
  bind(driver.cuDeviceGet, library, "cuDeviceGet");
  bind(driver.cuDevicePrimaryCtxRetain, library, "cuDevicePrimaryCtxRetain");
  bind(driver.cuDevicePrimaryCtxRelease, library, "cuDevicePrimaryCtxRelease_v2");
  bind(driver.cuCtxPushCurrent, library, "cuCtxPushCurrent_v2");
  bind(driver.cuCtxPopCurrent, library, "cuCtxPopCurrent_v2");
  bind(driver.cuStreamCreate, library, "cuStreamCreate");
  bind(driver.cuStreamDestroy, library, "cuStreamDestroy_v2");
  bind(driver.cuStreamSynchronize, library, "cuStreamSynchronize");
  bind(driver.cuStreamWaitEvent, library, "cuStreamWaitEvent");
  bind(driver.cuStreamIsCapturing, library, "cuStreamIsCapturing");
  bind(driver.cuThreadExchangeStreamCaptureMode, library, "cuThreadExchangeStreamCaptureMode");
  bind(driver.cuEventCreate, library, "cuEventCreate");
  bind(driver.cuEventDestroy, library, "cuEventDestroy_v2");
  bind(driver.cuEventRecord, library, "cuEventRecord");
  bind(driver.cuEventQuery, library, "cuEventQuery");
  bind(driver.cuEventSynchronize, library, "cuEventSynchronize");
  bind(driver.cuMemcpyHtoDAsync, library, "cuMemcpyHtoDAsync_v2");
  bind(driver.cuMemcpyDtoHAsync, library, "cuMemcpyDtoHAsync_v2");
  bind(driver.cuMemcpyDtoDAsync, library, "cuMemcpyDtoDAsync_v2");
  bind(driver.cuMemsetD8Async, library, "cuMemsetD8Async");
  bind(driver.cuMemHostRegister, library, "cuMemHostRegister_v2");
  bind(driver.cuMemHostUnregister, library, "cuMemHostUnregister");
  driver.current_stream = reinterpret_cast<decltype(driver.current_stream)>(find_current_stream());
  return driver;
}

}  // namespace

const CudaDriver& cuda_driver() {
  // An exception leaves it unset: the next call tries again.
  static const CudaDriver driver = load();
  return driver;
}

std::string cuda_error_text(CudaResult result) {
  const char* name = nullptr;
  const char* text = nullptr;
  cuda_driver().cuGetErrorName(result, &name);
  cuda_driver().cuGetErrorString(result, &text);
  return concat(name == nullptr ? "CUDA error" : name, " ", result, " (",
                text == nullptr ? "unknown" : text, ")");
}

}  // namespace nexus
