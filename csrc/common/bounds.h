// Whether numbers that came from outside name something that is there.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nexus {

constexpr bool is_index(int index, size_t count) {
  return index >= 0 && index < static_cast<int>(count);
}

// Whether [offset, offset + nbytes) lies in [0, size), without overflow.
constexpr bool is_range(int64_t offset, int64_t nbytes, int64_t size) {
  return offset >= 0 && nbytes >= 0 && nbytes <= size && offset <= size - nbytes;
}

}  // namespace nexus
