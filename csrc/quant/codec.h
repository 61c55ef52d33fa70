// How packed weights become numbers on a CPU: one table of kernels for each instruction set.
//
//   4-bit codes  w[j] = round(code[nibble j] * absmax[j / blocksize])   the high half comes first
//   bytes        w[j] = round((q[j] * scale) * inverse)
//
// All arithmetic is float32 without FMA and is rounded once, in the end: each set of kernels gives
// the same bits. The formats are those of bitsandbytes; see nexus_ext/quant/reference.py.
#pragma once

#include <cstdint>
#include <string>

namespace nexus {

enum class Float { k32, k16, kB16 };

inline int64_t size_of(Float type) { return type == Float::k32 ? 4 : 2; }

struct Codec {
  const char* name;
  // Decodes `count` elements from the first of a block on; `packed` and `absmax` begin there.
  // `past_cache` writes around the caches, for results that do not fit there.
  void (*nibbles)(const uint8_t* packed, const float* absmax, const float* code, int64_t blocksize,
                  int64_t count, Float to, bool past_cache, std::byte* out);
  // Decodes `count` elements that share a scale.
  void (*bytes)(const int8_t* packed, float scale, float inverse, int64_t count, Float to,
                std::byte* out);
  // Sum of a[i] * b[i]; in float32, in any order, with or without FMA.
  float (*dot)(const std::byte* a, const std::byte* b, int64_t count, Float type);
  // Rows of 4-bit codes, one behind the other, times up to kFusedInputs rows of bfloat16, decoded
  // in registers; null where there is nothing better than `nibbles` and `dot`. `x` is what
  // `shuffle_for_dots` made; width is a multiple of kDotsWidth, blocksize of half of it. Writes
  // sums[row * num_inputs + input]. Here a denormal weight may count as zero, which is far below
  // what a sum can tell.
  void (*nibble_dots)(const uint8_t* packed, const float* absmax, const float* code,
                      int64_t blocksize, int64_t width, int64_t num_rows, const std::byte* x,
                      int64_t num_inputs, float* sums);
};

// Rows of x a fused product takes at most.
inline constexpr int64_t kFusedInputs = 8;

inline constexpr int64_t kDotsWidth = 128;

// The order in which `nibble_dots` meets the elements of a row: of every kDotsWidth the ones with
// index 1 modulo 4, then 0, 3 and 2. Two bytes each; `width` is a multiple of kDotsWidth.
void shuffle_for_dots(const uint16_t* row, int64_t width, uint16_t* out);

extern const Codec kScalarCodec;
extern const Codec kAvx2Codec;
extern const Codec kAvx512Codec;
extern const Codec kAvx512Bf16Codec;

// The fastest this machine has, or what `use_codec` said last.
const Codec& codec();

// "auto", or a name: "scalar", "avx2", "avx512", "avx512bf16". Returns the name in use from now on.
// Throws ConfigError for one that the machine does not have.
std::string use_codec(const std::string& name);

}  // namespace nexus
