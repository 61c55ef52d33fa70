// Numbers to 4-bit NormalFloat codes, as bitsandbytes does it: see nexus_ext/quant/reference.py.
#pragma once

#include <cstdint>

#include "quant/codec.h"

namespace nexus {

// `count` numbers from a block's first on: (count + 1) / 2 bytes of codes, and a scale per block.
// False if one of them is not finite.
bool encode_nf4(const std::byte* numbers, Float type, int64_t blocksize, int64_t count,
                uint8_t* packed, float* absmax);

}  // namespace nexus
