// Reading bytes whose blocks have digests: each block is hashed as soon as it is there, while
// others are still on their way.
//
//   pieces ──reader──▶ out, or a slot and from there to out ──block complete──▶ XXH3-64 ──▶ verdict
//
// Owns nothing beyond a call. What the reader does not deliver in one piece (short, interrupted,
// refused as direct) is read plainly, through the page cache. A block that differs from its digest
// is read once more, plainly, before it is called bad: memory, bus and cable may lie once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "io/fault.h"
#include "io/file.h"
#include "io/ladder.h"

namespace nexus {

// `nbytes` of a file from `offset` on, in blocks of which the last may be shorter.
struct BlockTable {
  int64_t offset;
  int64_t nbytes;
  int64_t block_bytes;
  std::span<const int64_t> digests;  // XXH3-64, one for each block
};

struct BlockVerdict {
  // The lowest block known to be bad, or -1.
  int64_t bad_block = -1;
  // Why: errno of a read that failed, ENODATA where the file ends early, 0 where bytes differ.
  int64_t error = 0;
  bool is_direct = false;
  bool is_ring = false;
  int64_t bytes_staged = 0;
  int64_t num_plain = 0;   // pieces that were read plainly
  int64_t num_second = 0;  // blocks that were read a second time
  int64_t num_faults = 0;  // injected
};

// Fills `out` (table.nbytes). Blocks. When a block is bad, `out` holds nothing that may be used.
// Throws CheckpointChanged, ReadError (the file cannot be opened), ConfigError (the mode).
BlockVerdict read_blocks(const std::string& path, const Stamp& stamp, const BlockTable& table,
                         std::byte* out, const ReadMode& mode, const FaultPlan* faults);

}  // namespace nexus
