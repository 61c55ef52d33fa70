// What a test sets and asks: functions that CUDA does not have, and the one that torch has. The
// contract of each is the docstring of its method in simcuda.py.
#include <cstring>

#include "gate.h"

#define CONTROL(type, name) extern "C" __attribute__((visibility("default"))) type name

namespace simcuda {
namespace {

// Declared memory holds these bytes until somebody writes: in no float format a likely weight.
constexpr int kGarbage = 0xdb;

int current_device(const Thread& thread) {
  return thread.contexts.empty() ? 0 : thread.contexts.back();
}

StreamPtr find_stream(Lock& lock, CUstream handle) {
  Thread& thread = this_thread();
  return Call{lock, thread, current_device(thread)}.stream(handle);
}

// The streams a thread has set, and under them those of the process.
CUstream current_stream(const Thread& thread, int device) {
  const auto own = thread.streams.find(device);
  if (own != thread.streams.end()) return own->second;
  const auto shared = world.default_streams.find(device);
  return shared == world.default_streams.end() ? nullptr : shared->second;
}

// Null takes back what was set.
CUresult set_stream(Lock& lock, std::map<int, CUstream>& streams, CUstream handle) {
  if (handle == nullptr) {
    streams.clear();
    return kSuccess;
  }
  const StreamPtr stream = find_stream(lock, handle);
  if (stream == nullptr) return kInvalidHandle;
  stream->is_callers = true;
  streams[stream->device] = handle;
  return kSuccess;
}

// -- reports -----------------------------------------------------------------------------------

class Json {
 public:
  Json& add(const std::string& key, int64_t value) { return raw(key, std::to_string(value)); }
  Json& raw(const std::string& key, const std::string& value) {
    text_ += (text_.empty() ? "\"" : ", \"") + key + "\": " + value;
    return *this;
  }
  std::string str() const { return "{" + text_ + "}"; }

 private:
  std::string text_;
};

// The length of the text; it is written if there is room for it and its end.
int64_t write_text(const std::string& text, char* out, int64_t capacity) {
  const auto length = static_cast<int64_t>(text.size());
  if (length < capacity) std::memcpy(out, text.c_str(), text.size() + 1);
  return length;
}

int64_t num_live_streams() {
  int64_t count = 0;
  for (const auto& [handle, stream] : world.streams) count += stream->of_test ? 0 : 1;
  return count;
}

std::string retains_by_device() {
  std::string list;
  for (int device = 0; device < world.num_devices; ++device) {
    list += (device == 0 ? "" : ", ") + std::to_string(world.retains[device]);
  }
  return "[" + list + "]";
}

void add_counts(Json& json, const Counts& counts) {
  json.add("num_blocking_streams", counts.num_blocking_streams)
      .add("num_timing_events", counts.num_timing_events)
      .add("num_pageable_copies", counts.num_pageable_copies)
      .add("num_bad_pointers", counts.num_bad_pointers)
      .add("num_bad_handles", counts.num_bad_handles)
      .add("num_use_after_free", counts.num_use_after_free)
      .add("num_unregistered_in_use", counts.num_unregistered_in_use)
      .add("num_synchronize", counts.num_synchronize)
      .add("num_synchronize_caller", counts.num_synchronize_caller)
      .add("num_calls_after_shutdown", counts.num_calls_after_shutdown)
      .add("num_failures", counts.num_failures)
      .add("num_dropped", counts.num_dropped)
      .add("push_balance_total", counts.push_balance_total)
      .add("num_h2d", counts.num_h2d)
      .add("num_d2h", counts.num_d2h)
      .add("num_d2d", counts.num_d2d)
      .add("h2d_bytes", counts.h2d_bytes)
      .add("d2h_bytes", counts.d2h_bytes)
      .add("d2d_bytes", counts.d2d_bytes)
      .add("largest_h2d_bytes", counts.largest_h2d_bytes);
}

}  // namespace

// -- the world ---------------------------------------------------------------------------------

CONTROL(void, sim_reset)(uint64_t seed, int64_t max_delay_us) { reset(seed, max_delay_us); }

CONTROL(int, sim_set_device_count)(int count) {
  const Lock lock(world.mutex);
  if (count < 0 || count > kMaxDevices) return kInvalidValue;
  world.num_devices = count;
  return kSuccess;
}

CONTROL(void, sim_set_patience)(int64_t ms) {
  const Lock lock(world.mutex);
  world.patience_ms = ms;
}

// -- memory ------------------------------------------------------------------------------------

CONTROL(int, sim_declare_device)(void* at, int64_t nbytes, int device) {
  const Lock lock(world.mutex);
  const auto begin = reinterpret_cast<uintptr_t>(at);
  if (nbytes <= 0 || device < 0 || device >= world.num_devices) return kInvalidValue;
  if (look_up(world.declared, begin, nbytes).range != nullptr) return kInvalidValue;
  world.declared[begin] = std::make_shared<Range>(Range{begin, nbytes, device});
  std::memset(at, kGarbage, static_cast<size_t>(nbytes));
  return kSuccess;
}

CONTROL(int, sim_forget_device)(void* at) {
  Lock lock(world.mutex);
  const auto found = world.declared.find(reinterpret_cast<uintptr_t>(at));
  if (found == world.declared.end()) return kInvalidValue;
  const RangePtr range = found->second;
  world.declared.erase(found);
  if (withdraw(lock, range)) ++world.counts.num_use_after_free;
  return kSuccess;
}

CONTROL(void, sim_set_any_memory_is_device)(int on) {
  const Lock lock(world.mutex);
  world.any_memory_is_device = on != 0;
}

CONTROL(void, sim_set_registered_limit)(int64_t nbytes) {
  const Lock lock(world.mutex);
  world.registered_limit = nbytes;
}

// -- the caller --------------------------------------------------------------------------------

CONTROL(CUstream, sim_create_stream)(int device) {
  const Lock lock(world.mutex);
  const StreamPtr stream = make_stream(device, kStreamNonBlocking);
  stream->of_test = true;
  stream->is_callers = true;
  return stream->handle;
}

CONTROL(int, sim_set_current_stream)(CUstream handle) {
  Lock lock(world.mutex);
  return set_stream(lock, this_thread().streams, handle);
}

CONTROL(int, sim_set_default_stream)(CUstream handle) {
  Lock lock(world.mutex);
  return set_stream(lock, world.default_streams, handle);
}

CONTROL(void, sim_mark_caller_thread)() {
  const Lock lock(world.mutex);
  this_thread().is_caller = true;
}

CONTROL(void, sim_set_inline_current)(int on) {
  const Lock lock(world.mutex);
  world.is_inline = on != 0;
}

// Torch's: 0 is success, and anything else failure.
CONTROL(int, aoti_torch_get_current_cuda_stream)(int32_t device, void** stream) {
  const Lock lock(world.mutex);
  const CUresult failure = injected_failure(__func__, false);
  if (failure != kSuccess || device < 0 || device >= world.num_devices) return 1;
  *stream = current_stream(this_thread(), device);
  return 0;
}

// -- streams -----------------------------------------------------------------------------------

CONTROL(int, sim_hold_stream)(CUstream handle, int on) {
  Lock lock(world.mutex);
  const StreamPtr stream = find_stream(lock, handle);
  if (stream == nullptr) return kInvalidHandle;
  stream->is_held = on != 0;
  stream->work.notify_all();
  return kSuccess;
}

CONTROL(int, sim_set_capturing)(CUstream handle, int mode) {
  Lock lock(world.mutex);
  const StreamPtr stream = find_stream(lock, handle);
  if (stream == nullptr) return kInvalidHandle;
  stream->capturing = mode;
  return kSuccess;
}

CONTROL(int, sim_enqueue_delay)(CUstream handle, int64_t us) {
  Lock lock(world.mutex);
  const StreamPtr stream = find_stream(lock, handle);
  if (stream == nullptr) return kInvalidHandle;
  return submit(lock, stream, Op{.kind = Op::Kind::kDelay, .delay_us = us});
}

CONTROL(int, sim_enqueue_copy)(CUstream handle, void* to, const void* from, int64_t nbytes) {
  Lock lock(world.mutex);
  const StreamPtr stream = find_stream(lock, handle);
  if (stream == nullptr) return kInvalidHandle;
  Op op{.kind = Op::Kind::kCopy,
        .to = reinterpret_cast<uintptr_t>(to),
        .from = reinterpret_cast<uintptr_t>(from),
        .nbytes = nbytes};
  const Lookup source = look_up(world.declared, op.from, nbytes);
  if (!source.whole && !world.any_memory_is_device) {
    ++world.counts.num_bad_pointers;
    return kInvalidValue;
  }
  if (source.whole) op.from_range = source.range;
  return submit(lock, stream, std::move(op));
}

CONTROL(int, sim_drain)() {
  Lock lock(world.mutex);
  std::vector<StreamPtr> streams = world.closing;
  for (const auto& [device, stream] : world.legacy) streams.push_back(stream);
  for (const auto& [handle, stream] : world.streams) streams.push_back(stream);
  for (const StreamPtr& stream : streams) {
    const CUresult code = drain(lock, stream, "the test");
    if (code != kSuccess) return code;
  }
  return kSuccess;
}

// -- failures ----------------------------------------------------------------------------------

CONTROL(void, sim_fail)(const char* name, int64_t nth, int code, int sticky) {
  const Lock lock(world.mutex);
  world.failures.push_back({name, nth, code, sticky != 0});
}

CONTROL(void, sim_fail_async)(int64_t nth_copy, int code) {
  const Lock lock(world.mutex);
  world.copy_failures.push_back({"", nth_copy, code, true});
}

CONTROL(void, sim_deinitialise)() {
  const Lock lock(world.mutex);
  world.is_deinitialised = true;
  wake_all();
}

CONTROL(int, sim_drop)(const char* what) {
  const Lock lock(world.mutex);
  return set_drops(what) ? kSuccess : kInvalidValue;
}

// -- questions ---------------------------------------------------------------------------------

CONTROL(int64_t, sim_calls)(char* out, int64_t capacity) {
  const Lock lock(world.mutex);
  Json json;
  for (const auto& [name, count] : world.calls) json.add(std::string(name), count);
  return write_text(json.str(), out, capacity);
}

CONTROL(int64_t, sim_counts)(char* out, int64_t capacity) {
  const Lock lock(world.mutex);
  Json json;
  json.add("live_streams", num_live_streams())
      .add("live_events", static_cast<int64_t>(world.events.size()))
      .add("registered_ranges", static_cast<int64_t>(world.registered.size()))
      .add("registered_bytes", world.registered_bytes)
      .add("push_balance", this_thread().push_balance)
      .raw("retains", retains_by_device());
  add_counts(json, world.counts);
  return write_text(json.str(), out, capacity);
}

}  // namespace simcuda
