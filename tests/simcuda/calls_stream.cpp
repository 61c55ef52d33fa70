// Streams and events.
#include "gate.h"

namespace simcuda {
namespace {

CUresult create_stream(Call& in, CUstream* out, unsigned flags) {
  if ((flags & ~kStreamNonBlocking) != 0) return kInvalidValue;
  *out = make_stream(in.device, flags)->handle;
  return kSuccess;
}

std::string side_of(const StreamPtr& stream) { return stream->is_callers ? "current" : "lane"; }

// Nobody may ask how far a stream is that is being captured, nor, while any thread captures in the
// global mode, how far anything is: unless the asking thread has set its own mode to relaxed.
bool is_question_forbidden(const Call& in, const StreamPtr& stream) {
  if (stream != nullptr && stream->capturing != 0) return true;
  if (in.thread.capture_mode == kCaptureRelaxed) return false;
  for (const auto& [handle, other] : world.streams) {
    if (other->capturing == 2) return true;
  }
  for (const auto& [device, other] : world.legacy) {
    if (other->capturing == 2) return true;
  }
  return false;
}

void count_synchronize(const Call& in) {
  ++world.counts.num_synchronize;
  if (in.thread.is_caller) ++world.counts.num_synchronize_caller;
}

bool is_reached(const EventPtr& event) { return event->last == nullptr || event->last->reached; }

}  // namespace

CUDA(cuStreamCreate)(CUstream* stream, unsigned flags) {
  return call(__func__, Needs::kContext,
              [&](Call& in) { return create_stream(in, stream, flags); });
}

CUDA(cuStreamCreateWithPriority)(CUstream* stream, unsigned flags, int) {
  return call(__func__, Needs::kContext,
              [&](Call& in) { return create_stream(in, stream, flags); });
}

CUDA(cuStreamDestroy_v2)(CUstream handle) {
  return release_call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    const StreamPtr stream = in.stream(handle);
    if (stream == nullptr || stream->handle == nullptr) return kInvalidHandle;
    close_stream(stream);
    return kSuccess;
  });
}

CUDA(cuStreamSynchronize)(CUstream handle) {
  return call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    const StreamPtr stream = in.stream(handle);
    if (stream == nullptr) return kInvalidHandle;
    count_synchronize(in);
    if (is_question_forbidden(in, stream)) return kCaptureUnsupported;
    return drain(in.lock, stream, "a host thread, in cuStreamSynchronize,");
  });
}

CUDA(cuStreamQuery)(CUstream handle) {
  return call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    const StreamPtr stream = in.stream(handle);
    if (stream == nullptr) return kInvalidHandle;
    if (is_question_forbidden(in, stream)) return kCaptureUnsupported;
    return stream->num_finished == stream->num_enqueued ? kSuccess : kNotReady;
  });
}

CUDA(cuStreamWaitEvent)(CUstream on, CUevent awaited, unsigned flags) {
  return call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    const StreamPtr stream = in.stream(on);
    const EventPtr event = in.event(awaited);
    if (stream == nullptr || event == nullptr) return kInvalidHandle;
    if (flags > 1) return kInvalidValue;
    if (is_dropped("wait:" + side_of(stream)) || is_reached(event)) return kSuccess;
    return submit(in.lock, stream, Op{.kind = Op::Kind::kWait, .point = event->last});
  });
}

CUDA(cuStreamIsCapturing)(CUstream handle, int* status) {
  return call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    const StreamPtr stream = in.stream(handle);
    if (stream == nullptr) return kInvalidHandle;
    *status = stream->capturing != 0 ? 1 : 0;
    return kSuccess;
  });
}

CUDA(cuThreadExchangeStreamCaptureMode)(int* mode) {
  return call(__func__, Needs::kDriver, [&](Call& in) -> CUresult {
    if (*mode < 0 || *mode > kCaptureRelaxed) return kInvalidValue;
    std::swap(*mode, in.thread.capture_mode);
    return kSuccess;
  });
}

CUDA(cuEventCreate)(CUevent* out, unsigned flags) {
  return call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    const bool is_timing = (flags & kEventDisableTiming) == 0;
    if (flags > 7 || ((flags & kEventInterprocess) != 0 && is_timing)) return kInvalidValue;
    if (is_timing) ++world.counts.num_timing_events;
    const int64_t number = ++world.num_handles;
    auto event = std::make_shared<Event>();
    event->name = "event " + std::to_string(number);
    event->device = in.device;
    *out = reinterpret_cast<CUevent>(0x6000'0000 + 16 * number);
    world.events[*out] = event;
    return kSuccess;
  });
}

CUDA(cuEventDestroy_v2)(CUevent handle) {
  return release_call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    if (in.event(handle) == nullptr) return kInvalidHandle;
    world.events.erase(handle);
    return kSuccess;
  });
}

CUDA(cuEventRecord)(CUevent recorded, CUstream on) {
  return call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    const StreamPtr stream = in.stream(on);
    const EventPtr event = in.event(recorded);
    if (stream == nullptr || event == nullptr) return kInvalidHandle;
    if (event->device != stream->device) return kInvalidHandle;
    if (is_dropped("record:" + side_of(stream))) return kSuccess;
    const std::string number = std::to_string(++event->num_records);
    event->last = std::make_shared<Point>();
    event->last->name = "record " + number + " of " + event->name + " on " + stream->name;
    event->stream = stream;
    return submit(in.lock, stream, Op{.kind = Op::Kind::kRecord, .point = event->last});
  });
}

CUDA(cuEventQuery)(CUevent handle) {
  return call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    const EventPtr event = in.event(handle);
    if (event == nullptr) return kInvalidHandle;
    if (is_question_forbidden(in, event->stream.lock())) return kCaptureUnsupported;
    return is_dropped("query") || is_reached(event) ? kSuccess : kNotReady;
  });
}

CUDA(cuEventSynchronize)(CUevent handle) {
  return call(__func__, Needs::kContext, [&](Call& in) -> CUresult {
    const EventPtr event = in.event(handle);
    if (event == nullptr) return kInvalidHandle;
    count_synchronize(in);
    if (is_question_forbidden(in, event->stream.lock())) return kCaptureUnsupported;
    if (is_dropped("synchronize") || is_reached(event)) return kSuccess;
    const PointPtr point = event->last;  // a record meanwhile is not waited for
    return wait_until(in.lock, "a host thread, in cuEventSynchronize, waits for " + point->name,
                      [&] { return point->reached; });
  });
}

}  // namespace simcuda
