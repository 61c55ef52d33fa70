// Weights in blocks of 32 elements, each behind its own step: two kinds of GGUF.
//
//   q8_0  34 bytes: a float16 step, 32 int8           w[j] = step * q[j]
//   q4_0  18 bytes: a float16 step, 16 bytes of codes  w[j] = step * (code[j] - 8)
//
// The low halves of q4_0 are elements 0 to 15, the high ones 16 to 31.
#pragma once

#include <cstdint>

#include "quant/codec.h"

namespace nexus {

inline constexpr int64_t kGgmlBlock = 32;

class Ggml {
 public:
  // Throws QuantizationError for an unknown kind.
  Ggml(const uint8_t* blocks, const std::string& kind);

  int64_t block_bytes() const { return is_q8_ ? 34 : 18; }
  // As Nibbles::decode.
  void decode(int64_t first, int64_t count, Float to, bool past_cache, std::byte* out) const;
  int64_t unit() const { return kGgmlBlock; }
  int64_t packed_bytes(int64_t numel) const { return numel / kGgmlBlock * block_bytes(); }

 private:
  const uint8_t* blocks_;
  bool is_q8_;
};

}  // namespace nexus
