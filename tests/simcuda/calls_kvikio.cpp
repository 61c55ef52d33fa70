// What kvikio looks up beside the calls of the program itself. It refuses to read at all, into host
// memory too, unless every one of them is there; those it has no use for say so when called.
#include <unistd.h>

#include <cstdlib>

#include "gate.h"

namespace simcuda {
namespace {

constexpr CUresult kNoSuchRange = 500;
constexpr CUresult kNotSupported = 801;

size_t whole_pages(size_t nbytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (nbytes + page - 1) / page * page;
}

bool is_device(CUdeviceptr at) {
  const Lock lock(world.mutex);
  return world.any_memory_is_device || look_up(world.declared, at, 1).range != nullptr;
}

}  // namespace

CUDA(cuMemHostAlloc)(void** out, size_t nbytes, unsigned flags) {
  const size_t size = whole_pages(nbytes);
  void* memory = std::aligned_alloc(static_cast<size_t>(sysconf(_SC_PAGESIZE)), size);
  const CUresult code = cuMemHostRegister_v2(memory, size, flags);
  if (code == kSuccess) *out = memory;
  if (code != kSuccess) std::free(memory);
  return code;
}

CUDA(cuMemFreeHost)(void* memory) {
  const CUresult code = cuMemHostUnregister(memory);
  if (code == kSuccess) std::free(memory);
  return code;
}

CUDA(cuMemGetAddressRange_v2)(CUdeviceptr* base, size_t* nbytes, CUdeviceptr at) {
  return call(__func__, Needs::kContext, [&](Call&) -> CUresult {
    const Lookup found = look_up(world.declared, at, 1);
    if (found.range == nullptr) return kNoSuchRange;
    if (base != nullptr) *base = found.range->begin;
    if (nbytes != nullptr) *nbytes = static_cast<size_t>(found.range->nbytes);
    return kSuccess;
  });
}

// With unified addresses a pointer says where it points.
CUDA(cuMemcpyAsync)(CUdeviceptr to, CUdeviceptr from, size_t nbytes, CUstream stream) {
  if (!is_device(to)) {
    return cuMemcpyDtoHAsync_v2(reinterpret_cast<void*>(to), from, nbytes, stream);
  }
  if (is_device(from)) return cuMemcpyDtoDAsync_v2(to, from, nbytes, stream);
  return cuMemcpyHtoDAsync_v2(to, reinterpret_cast<const void*>(from), nbytes, stream);
}

CUDA(cuMemcpyBatchAsync_v2)(CUdeviceptr* to, CUdeviceptr* from, size_t* nbytes, size_t count, void*,
                            size_t*, size_t, CUstream stream) {
  CUresult code = stream == nullptr ? kInvalidValue : kSuccess;
  for (size_t i = 0; i < count && code == kSuccess; ++i) {
    code = cuMemcpyAsync(to[i], from[i], nbytes[i], stream);
  }
  return code;
}

CUDA(cuCtxCreate_v4)(CUcontext*, void*, unsigned, CUdevice) { return kNotSupported; }

CUDA(cuCtxDestroy_v2)(CUcontext) { return kNotSupported; }

CUDA(cuLaunchHostFunc)(CUstream, void (*)(void*), void*) { return kNotSupported; }

}  // namespace simcuda
