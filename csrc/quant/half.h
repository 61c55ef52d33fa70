// Rounding float32 to the two short floats and back, one number at a time: to nearest, ties to
// even, denormals kept, NaN stays NaN. Everything that is faster must give these bits.
#pragma once

#include <bit>
#include <cstdint>

namespace nexus {

inline uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t to_float16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (rest >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // 2^16 and more: infinity
  if (rest < 0x38800000) {
    // Below 2^-14 the result is denormal: its last bit is that of 0.5f, so an addition rounds it.
    const float shifted = std::bit_cast<float>(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000));
  }
  rest += 0xc8000fff + ((rest >> 13) & 1);  // the bias of the exponent, and half of the last bit
  return static_cast<uint16_t>(sign | (rest >> 13));
}

inline float from_bfloat16(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

inline float from_float16(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(value & 0x7fff) << 13;
  if (rest >= 0x0f800000) return std::bit_cast<float>(sign | (rest + 0x70000000));  // inf and NaN
  // Scaling by 2^112 moves the bias, and is exact for denormals too.
  const float scaled = std::bit_cast<float>(rest) * std::bit_cast<float>(0x77800000u);
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

}  // namespace nexus
