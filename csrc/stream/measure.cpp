#include "stream/measure.h"

#include <algorithm>
#include <chrono>
#include <optional>

#include "common/json.h"
#include "stream/pinned.h"

namespace nexus {
namespace {

using Clock = std::chrono::steady_clock;

// Copies that are enqueued together, so that none waits for the next call.
constexpr int kSources = 8;

// Whatever happens, nothing is copied out of memory that is gone.
struct DrainAtEnd {
  Device& device;
  ~DrainAtEnd() { device.drain(); }
};

}  // namespace

std::string measure_copy(Device& device, std::byte* arena, int64_t arena_bytes, int64_t chunk_bytes,
                         int64_t max_bytes) {
  if (chunk_bytes <= 0 || chunk_bytes > arena_bytes || max_bytes < chunk_bytes) {
    fail("ConfigError", "A rate is measured with chunks that fit into the arena; got ", chunk_bytes,
         " bytes of ", arena_bytes, ", ", max_bytes, " in all.");
  }
  const Staging sources(kSources, chunk_bytes);
  std::optional<PinnedLock> lock;
  try {
    lock.emplace(device, sources.memory(), sources.stride());
  } catch (const DeviceLost&) {
    throw;
  } catch (const Error&) {
    // Not page-locked is slower, and reported.
  }
  const DrainAtEnd drain = {device};
  const Lane lane = device.make_lane();
  const Event done = device.make_event();
  device.record(done, device.current());
  device.wait(lane, done);
  const auto copy = [&](int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      device.copy(lane, arena, sources.slot(static_cast<int>(i % kSources)), chunk_bytes);
    }
    device.record(done, lane);
    device.block(done);
  };
  copy(kSources);
  const int64_t count = max_bytes / chunk_bytes;
  const Clock::time_point began = Clock::now();
  copy(count);
  const double seconds = std::chrono::duration<double>(Clock::now() - began).count();
  const auto bytes = count * chunk_bytes;
  JsonObject out;
  out.add("bytes", bytes)
      .add("seconds", seconds)
      .add("gbps", static_cast<double>(bytes) / std::max(seconds, 1e-9) * 1e-9)
      .add("is_pinned", lock.has_value());
  return out.str();
}

}  // namespace nexus
