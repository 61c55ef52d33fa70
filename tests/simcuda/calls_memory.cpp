// Memory: who may be copied from and to, and what a copy promises about its source.
#include <unistd.h>

#include <algorithm>

#include "gate.h"

namespace simcuda {

Lookup look_up(const Ranges& ranges, uintptr_t at, int64_t nbytes) {
  const uintptr_t end = at + static_cast<uintptr_t>(nbytes);
  auto found = ranges.upper_bound(at);
  if (found != ranges.begin()) {
    const RangePtr& before = std::prev(found)->second;
    if (before->begin + static_cast<uintptr_t>(before->nbytes) > at) --found;
  }
  if (found == ranges.end() || found->first >= end) return {};
  const RangePtr& range = found->second;
  const uintptr_t range_end = range->begin + static_cast<uintptr_t>(range->nbytes);
  return {range, range->begin <= at && end <= range_end};
}

namespace {

constexpr unsigned kRegisterFlags = 0xf;

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// True if the memory is a device's; `range` is null where nobody keeps track of it.
bool find_device(uintptr_t at, int64_t nbytes, RangePtr* range) {
  const Lookup found = look_up(world.declared, at, nbytes);
  if (found.whole) *range = found.range;
  if (found.whole || world.any_memory_is_device) return true;
  ++world.counts.num_bad_pointers;
  return false;
}

// True if the memory is the host's and either in one registered range or in none.
bool find_host(uintptr_t at, int64_t nbytes, RangePtr* range) {
  const Lookup found = look_up(world.registered, at, nbytes);
  const bool is_torn = found.range != nullptr && !found.whole;
  const bool is_device = look_up(world.declared, at, nbytes).range != nullptr;
  if (is_torn || is_device) ++world.counts.num_bad_pointers;
  *range = found.range;
  return !is_torn && !is_device;
}

Op copy_op(uintptr_t to, uintptr_t from, size_t nbytes) {
  return Op{
      .kind = Op::Kind::kCopy, .to = to, .from = from, .nbytes = static_cast<int64_t>(nbytes)};
}

// Pageable memory is the caller's again when the call returns.
void stage(Op& op) {
  const auto* from = reinterpret_cast<const unsigned char*>(op.from);
  op.staged = std::make_shared<std::vector<unsigned char>>(from, from + op.nbytes);
}

void arm(Op& op) {
  for (Failure& failure : world.copy_failures) {
    if (failure.countdown-- == 0) op.breaks = failure.code;
  }
}

CUresult submit_copy(Call& in, CUstream handle, Op op) {
  const StreamPtr stream = in.stream(handle);
  if (stream == nullptr) return kInvalidHandle;
  arm(op);
  return submit(in.lock, stream, std::move(op));
}

void count_h2d(int64_t nbytes) {
  ++world.counts.num_h2d;
  world.counts.h2d_bytes += nbytes;
  world.counts.largest_h2d_bytes = std::max(world.counts.largest_h2d_bytes, nbytes);
}

bool is_page_aligned(uintptr_t value) {
  return value % static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)) == 0;
}

// -- what a pointer is -------------------------------------------------------------------------

struct Owner {
  RangePtr range;
  int memory_type = 0;  // 0: unknown to CUDA, 1: host, 2: device
  int device = -2;      // CU_DEVICE_INVALID
};

Owner owner_of(uintptr_t at) {
  Lookup found = look_up(world.declared, at, 1);
  if (found.whole) return {found.range, 2, found.range->device};
  found = look_up(world.registered, at, 1);
  if (found.whole) return {found.range, 1, found.range->device};
  if (world.any_memory_is_device) return {nullptr, 2, 0};
  return {};
}

// Numbers as in CUpointer_attribute.
CUresult write_attribute(const Owner& owner, int attribute, uintptr_t at, void* out) {
  const bool is_known = owner.memory_type != 0;
  switch (attribute) {
    case 1:  // CONTEXT
      *static_cast<CUcontext*>(out) = is_known ? context_of(owner.device) : nullptr;
      return kSuccess;
    case 2:  // MEMORY_TYPE
      *static_cast<unsigned*>(out) = static_cast<unsigned>(owner.memory_type);
      return kSuccess;
    case 3:  // DEVICE_POINTER
      *static_cast<CUdeviceptr*>(out) = is_known ? at : 0;
      return kSuccess;
    case 4:  // HOST_POINTER
      *static_cast<uintptr_t*>(out) = owner.memory_type == 1 ? at : 0;
      return kSuccess;
    case 8:  // IS_MANAGED
      *static_cast<unsigned*>(out) = 0;
      return kSuccess;
    case 9:  // DEVICE_ORDINAL
      *static_cast<int*>(out) = owner.device;
      return kSuccess;
    case 11:  // RANGE_START_ADDR
      *static_cast<uintptr_t*>(out) = owner.range == nullptr ? 0 : owner.range->begin;
      return kSuccess;
    case 12:  // RANGE_SIZE
      *static_cast<size_t*>(out) =
          owner.range == nullptr ? 0 : static_cast<size_t>(owner.range->nbytes);
      return kSuccess;
    case 13:  // MAPPED
      *static_cast<unsigned*>(out) = is_known ? 1 : 0;
      return kSuccess;
    default:
      return kInvalidValue;
  }
}

}  // namespace

CUDA(cuMemcpyHtoDAsync_v2)(CUdeviceptr to, const void* from, size_t nbytes, CUstream stream) {
  return call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    Op op = copy_op(to, address(from), nbytes);
    if (nbytes == 0) return kSuccess;
    if (!find_device(op.to, op.nbytes, &op.to_range)) return kInvalidValue;
    if (!find_host(op.from, op.nbytes, &op.from_range)) return kInvalidValue;
    if (op.from_range == nullptr) {
      ++world.counts.num_pageable_copies;
      stage(op);
    }
    count_h2d(op.nbytes);
    return submit_copy(in, stream, std::move(op));
  });
}

CUDA(cuMemcpyDtoHAsync_v2)(void* to, CUdeviceptr from, size_t nbytes, CUstream handle) {
  return call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    Op op = copy_op(address(to), from, nbytes);
    if (nbytes == 0) return kSuccess;
    if (!find_device(op.from, op.nbytes, &op.from_range)) return kInvalidValue;
    if (!find_host(op.to, op.nbytes, &op.to_range)) return kInvalidValue;
    const bool is_pageable = op.to_range == nullptr;
    ++world.counts.num_d2h;
    world.counts.d2h_bytes += op.nbytes;
    const CUresult code = submit_copy(in, handle, std::move(op));
    if (code != kSuccess || !is_pageable) return code;
    // As CUDA does: pageable memory holds the bytes when the call returns.
    ++world.counts.num_pageable_copies;
    return drain(in.lock, in.stream(handle), "a host thread, in cuMemcpyDtoHAsync,");
  });
}

CUDA(cuMemcpyDtoDAsync_v2)(CUdeviceptr to, CUdeviceptr from, size_t nbytes, CUstream stream) {
  return call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    Op op = copy_op(to, from, nbytes);
    if (nbytes == 0) return kSuccess;
    if (!find_device(op.to, op.nbytes, &op.to_range)) return kInvalidValue;
    if (!find_device(op.from, op.nbytes, &op.from_range)) return kInvalidValue;
    ++world.counts.num_d2d;
    world.counts.d2d_bytes += op.nbytes;
    return submit_copy(in, stream, std::move(op));
  });
}

CUDA(cuMemsetD8Async)(CUdeviceptr to, unsigned char value, size_t nbytes, CUstream handle) {
  return call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    const StreamPtr stream = in.stream(handle);
    // A memset is a kernel: it runs on the device of the current context.
    if (stream == nullptr || stream->device != in.device) return kInvalidHandle;
    Op op = copy_op(to, 0, nbytes);
    op.kind = Op::Kind::kFill;
    op.value = value;
    if (nbytes == 0) return kSuccess;
    if (!find_device(op.to, op.nbytes, &op.to_range)) return kInvalidValue;
    return submit(in.lock, stream, std::move(op));
  });
}

CUDA(cuMemHostRegister_v2)(void* at, size_t nbytes, unsigned flags) {
  return call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    const auto size = static_cast<int64_t>(nbytes);
    const bool is_aligned = is_page_aligned(address(at)) && is_page_aligned(nbytes);
    if (at == nullptr || nbytes == 0 || !is_aligned) return kInvalidValue;
    if ((flags & ~kRegisterFlags) != 0) return kInvalidValue;
    if (look_up(world.registered, address(at), size).range != nullptr) return kAlreadyRegistered;
    const int64_t limit = world.registered_limit;
    if (limit >= 0 && world.registered_bytes + size > limit) return kOutOfMemory;
    world.registered_bytes += size;
    world.registered[address(at)] = std::make_shared<Range>(Range{address(at), size, in.device});
    return kSuccess;
  });
}

CUDA(cuMemHostUnregister)(void* at) {
  return release_call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    const auto found = world.registered.find(address(at));
    if (found == world.registered.end()) return kNotRegistered;
    const RangePtr range = found->second;
    world.registered.erase(found);
    world.registered_bytes -= range->nbytes;
    if (withdraw(in.lock, range)) ++world.counts.num_unregistered_in_use;
    return kSuccess;
  });
}

CUDA(cuPointerGetAttribute)(void* out, int attribute, CUdeviceptr at) {
  return call(__func__, Needs::kDriver, [&](Call&) -> CUresult {
    const Owner owner = owner_of(at);
    if (owner.memory_type == 0) return kInvalidValue;
    return write_attribute(owner, attribute, at, out);
  });
}

// Unlike the single question, this one has an answer for every pointer.
CUDA(cuPointerGetAttributes)(unsigned count, int* attributes, void** out, CUdeviceptr at) {
  return call(__func__, Needs::kDriver, [&](Call&) -> CUresult {
    const Owner owner = owner_of(at);
    for (unsigned i = 0; i < count; ++i) {
      const CUresult code = write_attribute(owner, attributes[i], at, out[i]);
      if (code != kSuccess) return code;
    }
    return kSuccess;
  });
}

}  // namespace simcuda
