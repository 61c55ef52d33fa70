// One element after another: what every machine can, and what the others leave over at the end.
#pragma once

#include <cstring>

#include "quant/codec.h"
#include "quant/half.h"

namespace nexus {

inline void store(Float to, float value, std::byte* out) {
  if (to == Float::k32) {
    std::memcpy(out, &value, 4);
    return;
  }
  const uint16_t half = to == Float::kB16 ? to_bfloat16(value) : to_float16(value);
  std::memcpy(out, &half, 2);
}

inline float load(Float type, const std::byte* from) {
  if (type == Float::k32) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, from, 2);
  return type == Float::kB16 ? from_bfloat16(half) : from_float16(half);
}

// Elements [begin, end) of one block.
inline void nibbles_of_block(const uint8_t* packed, float absmax, const float* code, int64_t begin,
                             int64_t end, Float to, std::byte* out) {
  for (int64_t j = begin; j < end; ++j) {
    const int nibble = j % 2 == 0 ? packed[j / 2] >> 4 : packed[j / 2] & 15;
    store(to, code[nibble] * absmax, out + j * size_of(to));
  }
}

inline void bytes_one_by_one(const int8_t* packed, float scale, float inverse, int64_t begin,
                             int64_t end, Float to, std::byte* out) {
  for (int64_t j = begin; j < end; ++j) {
    store(to, static_cast<float>(packed[j]) * scale * inverse, out + j * size_of(to));
  }
}

inline float dot_one_by_one(const std::byte* a, const std::byte* b, int64_t begin, int64_t end,
                            Float type) {
  float sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    sum += load(type, a + i * size_of(type)) * load(type, b + i * size_of(type));
  }
  return sum;
}

}  // namespace nexus
