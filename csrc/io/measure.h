// The ceiling: how fast this file can be read when nothing else is asked of the machine.
#pragma once

#include <string>

#include "io/ladder.h"

namespace nexus {

// Reads up to `max_bytes` of the file, front to back, wrapping at its end, into staging memory.
// Returns JSON: io_mode, reader, refusal, depth, chunk_bytes, bytes, seconds, gbps (1e9 bytes/s),
// memory_alignment, offset_alignment.
std::string measure_read(const std::string& path, const ReadMode& mode, int64_t max_bytes);

}  // namespace nexus
