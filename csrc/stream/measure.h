// How fast a device takes bytes: the ceiling that streaming is compared with, and the size of its
// pieces.
#pragma once

#include <cstdint>
#include <string>

#include "device/device.h"

namespace nexus {

// Copies about `max_bytes` from page-locked memory into `arena`, `chunk_bytes` at a time, and
// blocks until the last has arrived. JSON: bytes, seconds, gbps (1e9 bytes a second), is_pinned.
std::string measure_copy(Device& device, std::byte* arena, int64_t arena_bytes, int64_t chunk_bytes,
                         int64_t max_bytes);

}  // namespace nexus
