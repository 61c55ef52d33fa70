#include "quant/ggml.h"

#include <array>
#include <cstring>

#include "common/error.h"
#include "quant/half.h"

namespace nexus {

Ggml::Ggml(const uint8_t* blocks, const std::string& kind)
    : blocks_(blocks), is_q8_(kind == "q8_0") {
  if (!is_q8_ && kind != "q4_0") {
    fail("QuantizationError", "GGUF blocks are read as \"q8_0\" or \"q4_0\", got \"", kind,
         "\". Convert the file to one of these.");
  }
}

void Ggml::decode(int64_t first, int64_t count, Float to, bool, std::byte* out) const {
  const Codec& kernels = codec();
  const uint8_t* block = blocks_ + first / kGgmlBlock * block_bytes();
  for (int64_t done = 0; done < count; done += kGgmlBlock, block += block_bytes()) {
    uint16_t half;
    std::memcpy(&half, block, 2);
    std::array<int8_t, kGgmlBlock> unpacked;
    if (is_q8_) {
      std::memcpy(unpacked.data(), block + 2, unpacked.size());
    } else {
      for (size_t j = 0; j < 16; ++j) {
        unpacked[j] = static_cast<int8_t>((block[2 + j] & 15) - 8);
        unpacked[j + 16] = static_cast<int8_t>((block[2 + j] >> 4) - 8);
      }
    }
    kernels.bytes(unpacked.data(), from_float16(half), 1.0f, kGgmlBlock, to,
                  out + done * size_of(to));
  }
}

}  // namespace nexus
