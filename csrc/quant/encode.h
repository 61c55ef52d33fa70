// Numbers to 4-bit NormalFloat codes, as bitsandbytes does it: see nexus_ext/quant/reference.py.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "quant/codec.h"

namespace nexus {

// What the sixteen codes mean: quantiles of the normal distribution, as bitsandbytes' "nf4" has
// them.
inline constexpr std::array<float, 16> kNormalFloat = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// `count` numbers from a block's first on: (count + 1) / 2 bytes of codes, and a scale per block:
// of `num_scales` between the largest magnitude and kSmallestShare of it, the one that leaves the
// smallest squared error. False if a number is not finite.
bool encode_nf4(const std::byte* numbers, Float type, int64_t blocksize, int64_t num_scales,
                int64_t count, uint8_t* packed, float* absmax);

inline constexpr double kSmallestShare = 0.6;

}  // namespace nexus
