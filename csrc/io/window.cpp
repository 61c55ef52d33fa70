#include "io/window.h"

#include <algorithm>

#include "common/align.h"

namespace nexus {
namespace {

// Cuts [begin, end) of the file at aligned offsets.
void cut_range(const Extent& extent, int64_t begin, int64_t end, const Alignment& alignment,
               int64_t chunk_bytes, bool staged, std::vector<Piece>& pieces) {
  while (begin < end) {
    const int64_t next = std::min(end, align_down(begin + chunk_bytes, alignment.offset));
    const int64_t window_begin = staged ? align_down(begin, alignment.offset) : begin;
    const int64_t window_end = staged ? align_up(next, alignment.offset) : next;
    pieces.push_back({extent.file, begin, next - begin,
                      extent.group_offset + (begin - extent.offset), staged, window_begin,
                      window_end - window_begin});
    begin = next;
  }
}

}  // namespace

void cut(const Extent& extent, const std::byte* landing, const Alignment& alignment,
         int64_t chunk_bytes, std::vector<Piece>& pieces) {
  const int64_t begin = extent.offset;
  const int64_t end = extent.offset + extent.nbytes;
  if (landing == nullptr) {
    return cut_range(extent, begin, end, alignment, chunk_bytes, true, pieces);
  }
  const int64_t body_begin = align_up(begin, alignment.offset);
  const int64_t body_end = align_down(end, alignment.offset);
  const std::byte* body = landing + extent.group_offset + (body_begin - begin);
  if (body_begin >= body_end || !is_aligned(body, alignment.memory)) {
    cut_range(extent, begin, end, alignment, chunk_bytes, alignment.offset > 1, pieces);
    return;
  }
  // The body lands where it belongs; only the unaligned head and tail pass through a slot.
  cut_range(extent, begin, body_begin, alignment, chunk_bytes, true, pieces);
  cut_range(extent, body_begin, body_end, alignment, chunk_bytes, false, pieces);
  cut_range(extent, body_end, end, alignment, chunk_bytes, true, pieces);
}

int64_t slot_bytes(const Alignment& alignment, int64_t chunk_bytes) {
  return chunk_bytes + 2 * alignment.offset;
}

}  // namespace nexus
