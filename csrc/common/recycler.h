// Memory for large results that come and go: what is given back is kept for the next caller,
// because fresh pages cost several times what decoding into them does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace nexus {

using Block = std::shared_ptr<std::byte>;

// At least `nbytes`, on a 64-byte boundary, uninitialised. Goes back when the last owner lets go;
// at most kKeptBytes lie idle in the process, the latest first.
Block recycled_block(int64_t nbytes);

inline constexpr int64_t kKeptBytes = 256 << 20;

}  // namespace nexus
