// Rounding to power-of-two boundaries.
#pragma once

#include <cstdint>

namespace nexus {

constexpr int64_t align_down(int64_t value, int64_t alignment) { return value & ~(alignment - 1); }

constexpr int64_t align_up(int64_t value, int64_t alignment) {
  return align_down(value + alignment - 1, alignment);
}

constexpr bool is_aligned(int64_t value, int64_t alignment) {
  return (value & (alignment - 1)) == 0;
}

inline bool is_aligned(const void* pointer, int64_t alignment) {
  return is_aligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)), alignment);
}

}  // namespace nexus
