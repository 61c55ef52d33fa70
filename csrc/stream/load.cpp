#include "stream/load.h"

#include <algorithm>

namespace nexus {

int64_t Group::ram_phase() const {
  constexpr int64_t kPageBytes = 4096;
  const auto longest = std::ranges::max_element(extents, {}, &Extent::nbytes);
  if (longest == extents.end()) return 0;
  return ((longest->offset - longest->group_offset) % kPageBytes + kPageBytes) % kPageBytes;
}

}  // namespace nexus
