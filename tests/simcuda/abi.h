// The part of the CUDA driver's binary interface that the simulator offers: types and numbers. They
// are declared here because tests are built without a CUDA toolkit.
#pragma once

#include <cstddef>
#include <cstdint>

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct SimContext*;
using CUstream = struct SimStream*;
using CUevent = struct SimEvent*;

// The head of every simulated call; `cuGetProcAddress` finds whatever is defined with it.
#define CUDA(name) extern "C" __attribute__((visibility("default"))) CUresult name

namespace simcuda {

enum Code : CUresult {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kDeinitialized = 4,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotReady = 600,
  kContextIsDestroyed = 709,
  kAlreadyRegistered = 712,
  kNotRegistered = 713,
  kCaptureUnsupported = 900,
};

constexpr unsigned kStreamNonBlocking = 1;
constexpr int kCaptureRelaxed = 2;
constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kEventInterprocess = 4;

}  // namespace simcuda
