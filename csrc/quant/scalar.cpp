#include "quant/scalar.h"

#include <algorithm>

namespace nexus {
namespace {

void nibbles(const uint8_t* packed, const float* absmax, const float* code, int64_t blocksize,
             int64_t count, Float to, bool, std::byte* out) {
  for (int64_t first = 0; first < count; first += blocksize) {
    nibbles_of_block(packed + first / 2, *absmax++, code, 0, std::min(blocksize, count - first), to,
                     out + first * size_of(to));
  }
}

void bytes(const int8_t* packed, float scale, float inverse, int64_t count, Float to,
           std::byte* out) {
  bytes_one_by_one(packed, scale, inverse, 0, count, to, out);
}

float dot(const std::byte* a, const std::byte* b, int64_t count, Float type) {
  return dot_one_by_one(a, b, 0, count, type);
}

}  // namespace

const Codec kScalarCodec = {"scalar", nibbles, bytes, dot, nullptr};

}  // namespace nexus
