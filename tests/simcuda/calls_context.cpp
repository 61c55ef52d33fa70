// The library, devices and contexts.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

#include "gate.h"

namespace simcuda {
namespace {

constexpr int kVersion = 13'000;

struct Described {
  CUresult code;
  const char* name;
  const char* text;
};

constexpr Described kErrors[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {709, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "memory is already registered"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "memory has not been registered"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "not permitted when stream is capturing"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

CUresult describe(CUresult code, const char* Described::* field, const char** out) {
  const auto* found = std::ranges::find(kErrors, code, &Described::code);
  const bool is_known = found != std::end(kErrors);
  *out = is_known ? found->*field : nullptr;
  return is_known ? kSuccess : kInvalidValue;
}

// A context is the address of its device's place in here.
char contexts[kMaxDevices];

// -1: no such context.
int device_of(CUcontext context) {
  for (int device = 0; device < kMaxDevices; ++device) {
    if (context_of(device) == context) return device;
  }
  return -1;
}

bool exists(CUdevice device) { return device >= 0 && device < world.num_devices; }

// The device of a context that can be made current, or why it cannot.
CUresult check_context(CUcontext context, int* device) {
  *device = device_of(context);
  if (*device < 0) return kInvalidContext;
  return world.retains[*device] > 0 ? kSuccess : kContextIsDestroyed;
}

void push(Thread& thread, int device) {
  thread.contexts.push_back(device);
  ++thread.push_balance;
  ++world.counts.push_balance_total;
}

void pop(Thread& thread) {
  thread.contexts.pop_back();
  --thread.push_balance;
  --world.counts.push_balance_total;
}

// Numbers as in CUdevice_attribute; any other attribute is 0.
int attribute_of(int attribute) {
  switch (attribute) {
    case 16:  // MULTIPROCESSOR_COUNT
      return 132;
    case 19:  // CAN_MAP_HOST_MEMORY
    case 41:  // UNIFIED_ADDRESSING
    case 91:  // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
    case 99:  // HOST_REGISTER_SUPPORTED
      return 1;
    case 40:  // ASYNC_ENGINE_COUNT
      return 3;
    case 75:  // COMPUTE_CAPABILITY_MAJOR
      return 9;
    default:
      return 0;
  }
}

// The newest of a function's versions that this library defines.
void* find_function(const std::string& name) {
  if (!name.starts_with("cu")) return nullptr;
  Dl_info self;
  if (dladdr(&contexts, &self) == 0) return nullptr;
  void* library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  void* found = dlsym(library, (name + "_v2").c_str());
  if (found == nullptr) found = dlsym(library, name.c_str());
  dlclose(library);
  return found;
}

}  // namespace

CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(&contexts[device]); }

CUDA(cuGetErrorName)(CUresult error, const char** name) {
  return call(__func__, Needs::kNothing,
              [&](Call&) { return describe(error, &Described::name, name); });
}

CUDA(cuGetErrorString)(CUresult error, const char** text) {
  return call(__func__, Needs::kNothing,
              [&](Call&) { return describe(error, &Described::text, text); });
}

CUDA(cuGetProcAddress_v2)(const char* name, void** function, int, uint64_t, int* status) {
  return call(__func__, Needs::kLibrary, [&](Call&) -> CUresult {
    *function = find_function(name);
    // Null is a success: CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND is the news.
    if (status != nullptr) *status = *function != nullptr ? 0 : 1;
    return kSuccess;
  });
}

CUDA(cuDriverGetVersion)(int* version) {
  return call(__func__, Needs::kLibrary, [&](Call&) -> CUresult {
    *version = kVersion;
    return kSuccess;
  });
}

CUDA(cuInit)(unsigned flags) {
  return call(__func__, Needs::kLibrary, [&](Call&) -> CUresult {
    if (flags != 0) return kInvalidValue;
    if (world.num_devices == 0) return kNoDevice;
    world.is_initialised = true;
    return kSuccess;
  });
}

CUDA(cuDeviceGetCount)(int* count) {
  return call(__func__, Needs::kDriver, [&](Call&) -> CUresult {
    *count = world.num_devices;
    return kSuccess;
  });
}

CUDA(cuDeviceGet)(CUdevice* device, int ordinal) {
  return call(__func__, Needs::kDriver, [&](Call&) -> CUresult {
    if (!exists(ordinal)) return kInvalidDevice;
    *device = ordinal;
    return kSuccess;
  });
}

CUDA(cuDeviceGetName)(char* name, int length, CUdevice device) {
  return call(__func__, Needs::kDriver, [&](Call&) -> CUresult {
    if (!exists(device)) return kInvalidDevice;
    if (length <= 0) return kInvalidValue;
    std::snprintf(name, static_cast<size_t>(length), "Simulated device %d", device);
    return kSuccess;
  });
}

CUDA(cuDeviceGetAttribute)(int* value, int attribute, CUdevice device) {
  return call(__func__, Needs::kDriver, [&](Call&) -> CUresult {
    if (!exists(device)) return kInvalidDevice;
    if (attribute <= 0) return kInvalidValue;
    *value = attribute_of(attribute);
    return kSuccess;
  });
}

CUDA(cuDevicePrimaryCtxRetain)(CUcontext* context, CUdevice device) {
  return call(__func__, Needs::kDriver, [&](Call&) -> CUresult {
    if (!exists(device)) return kInvalidDevice;
    ++world.retains[device];
    *context = context_of(device);
    return kSuccess;
  });
}

CUDA(cuDevicePrimaryCtxRelease_v2)(CUdevice device) {
  return release_call(__func__, Needs::kDriver, [&](Call&) -> CUresult {
    if (!exists(device)) return kInvalidDevice;
    if (world.retains[device] == 0) return kInvalidContext;
    --world.retains[device];
    return kSuccess;
  });
}

CUDA(cuCtxPushCurrent_v2)(CUcontext context) {
  return call(__func__, Needs::kDriver, [&](Call& in) -> CUresult {
    int device;
    const CUresult code = check_context(context, &device);
    if (code == kSuccess) push(in.thread, device);
    return code;
  });
}

CUDA(cuCtxPopCurrent_v2)(CUcontext* context) {
  return release_call(__func__, Needs::kDriver, [&](Call& in) -> CUresult {
    if (in.thread.contexts.empty()) return kInvalidContext;
    if (context != nullptr) *context = context_of(in.thread.contexts.back());
    pop(in.thread);
    return kSuccess;
  });
}

CUDA(cuCtxSetCurrent)(CUcontext context) {
  return call(__func__, Needs::kDriver, [&](Call& in) -> CUresult {
    int device = -1;
    const CUresult code = context == nullptr ? kSuccess : check_context(context, &device);
    if (code != kSuccess) return code;
    if (!in.thread.contexts.empty()) pop(in.thread);
    if (context != nullptr) push(in.thread, device);
    return kSuccess;
  });
}

CUDA(cuCtxGetCurrent)(CUcontext* context) {
  return call(__func__, Needs::kDriver, [&](Call& in) -> CUresult {
    const auto& contexts = in.thread.contexts;
    *context = contexts.empty() ? nullptr : context_of(contexts.back());
    return kSuccess;
  });
}

CUDA(cuCtxGetDevice)(CUdevice* device) {
  return call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    *device = in.device;
    return kSuccess;
  });
}

}  // namespace simcuda
