// Cutting an extent into pieces a reader can serve: at most one read and one copy each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "io/file.h"

namespace nexus {

// Contiguous bytes of a file that belong at contiguous bytes of a group.
struct Extent {
  int file;
  int64_t offset;
  int64_t nbytes;
  int64_t group_offset;
};

// One read. A staged piece is read as its aligned superset into a staging slot and copied out of
// it; any other goes straight to its place.
struct Piece {
  int file;
  int64_t offset;
  int64_t nbytes;
  int64_t group_offset;
  bool staged;
  int64_t window_offset;
  int64_t window_nbytes;
};

// Appends the pieces of `extent`, in file order. Each wants at most `chunk_bytes`; a staged one's
// window exceeds that by at most two alignment units. `landing` is where the group's first byte
// will be: whether a read may land there directly depends on it; null when no read may.
void cut(const Extent& extent, const std::byte* landing, const Alignment& alignment,
         int64_t chunk_bytes, std::vector<Piece>& pieces);

// Bytes a staging slot needs for any window of `cut`.
int64_t slot_bytes(const Alignment& alignment, int64_t chunk_bytes);

}  // namespace nexus
