// Packed weights as the kernels of `Codec` want them: checked once, decoded by ranges.
#pragma once

#include <cstdint>

#include "quant/codec.h"

namespace nexus {

// Where the scale of each block comes from: numbers, or one byte each that is decoded itself,
//   absmax[i] = nested_code[codes[i]] * nested_absmax[i / nested_blocksize] + nested_offset
struct Absmax {
  const float* plain = nullptr;
  const uint8_t* codes = nullptr;
  const float* nested_code = nullptr;
  const float* nested_absmax = nullptr;
  float nested_offset = 0;
  int64_t nested_blocksize = 1;
};

inline constexpr int64_t kDotsRows = 16;

// A weight of 4-bit codes, flat; the shape is of no importance to blocks.
class Nibbles {
 public:
  Nibbles(const uint8_t* packed, Absmax absmax, const float* code, int64_t blocksize)
      : packed_(packed), absmax_(absmax), code_(code), blocksize_(blocksize) {}

  // Elements from `first` on, which begins a block. One thread.
  void decode(int64_t first, int64_t count, Float to, bool past_cache, std::byte* out) const;
  // What ranges must begin at.
  int64_t unit() const { return blocksize_; }
  // Bytes of the codes of so many elements.
  int64_t packed_bytes(int64_t numel) const { return (numel + 1) / 2; }

  // Whether `dots` can take rows of this width.
  bool has_dots(int64_t width, Float type) const;
  // `sums[row * num_inputs + m]` becomes the product of row `first_row + row` and row m of x,
  // shuffled. At most kDotsRows rows.
  void dots(int64_t first_row, int64_t num_rows, int64_t width, const std::byte* x,
            int64_t num_inputs, float* sums) const;

 private:
  const uint8_t* packed_;
  Absmax absmax_;
  const float* code_;
  int64_t blocksize_;
};

// A weight of bytes with a scale for every `group` elements, which never cross a row.
class Bytes {
 public:
  Bytes(const int8_t* packed, const float* scale, int64_t group, float inverse)
      : packed_(packed), scale_(scale), group_(group), inverse_(inverse) {}

  // As Nibbles; may begin anywhere.
  void decode(int64_t first, int64_t count, Float to, bool past_cache, std::byte* out) const;
  int64_t unit() const { return 1; }
  int64_t packed_bytes(int64_t numel) const { return numel; }
  bool has_dots(int64_t, Float) const { return false; }
  void dots(int64_t, int64_t, int64_t, const std::byte*, int64_t, float*) const {}

 private:
  const int8_t* packed_;
  const float* scale_;
  int64_t group_;
  float inverse_;
};

// The values of `nested_code` etc. for blocks [first, first + count).
void decode_absmax(const Absmax& absmax, int64_t first, int64_t count, float* out);

}  // namespace nexus
