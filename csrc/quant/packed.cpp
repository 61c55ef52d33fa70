#include "quant/packed.h"

#include <algorithm>
#include <array>

namespace nexus {
namespace {

// Most blocks of a row that `dots` takes: 2^16 elements of 64.
constexpr int64_t kLongestRow = 1024;

}  // namespace

void decode_absmax(const Absmax& absmax, int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = first + i;
    // Two operations, two roundings.
    const float scaled = absmax.nested_code[absmax.codes[block]] *
                         absmax.nested_absmax[block / absmax.nested_blocksize];
    out[i] = scaled + absmax.nested_offset;
  }
}

void Nibbles::decode(int64_t first, int64_t count, Float to, bool past_cache,
                     std::byte* out) const {
  const Codec& kernels = codec();
  if (absmax_.plain != nullptr) {
    kernels.nibbles(packed_ + first / 2, absmax_.plain + first / blocksize_, code_, blocksize_,
                    count, to, past_cache, out);
    return;
  }
  std::array<float, 128> absmax;
  const int64_t step = static_cast<int64_t>(absmax.size()) * blocksize_;
  for (int64_t done = 0; done < count; done += step) {
    const int64_t now = std::min(step, count - done);
    decode_absmax(absmax_, (first + done) / blocksize_, (now + blocksize_ - 1) / blocksize_,
                  absmax.data());
    kernels.nibbles(packed_ + (first + done) / 2, absmax.data(), code_, blocksize_, now, to,
                    past_cache, out + done * size_of(to));
  }
}

bool Nibbles::has_dots(int64_t width, Float type) const {
  return codec().nibble_dots != nullptr && type == Float::kB16 && width % kDotsWidth == 0 &&
         blocksize_ >= kDotsWidth / 2 && width % blocksize_ == 0 &&
         width / blocksize_ <= kLongestRow;
}

void Nibbles::dots(int64_t first_row, int64_t num_rows, int64_t width, const std::byte* x,
                   int64_t num_inputs, float* sums) const {
  const int64_t blocks = width / blocksize_;
  const float* absmax = absmax_.plain + first_row * blocks;
  std::array<float, kDotsRows * kLongestRow> decoded;
  if (absmax_.plain == nullptr) {
    decode_absmax(absmax_, first_row * blocks, num_rows * blocks, decoded.data());
    absmax = decoded.data();
  }
  codec().nibble_dots(packed_ + first_row * width / 2, absmax, code_, blocksize_, width, num_rows,
                      x, num_inputs, sums);
}

void Bytes::decode(int64_t first, int64_t count, Float to, bool, std::byte* out) const {
  const Codec& kernels = codec();
  for (int64_t done = 0; done < count;) {
    const int64_t at = first + done;
    const int64_t now = std::min(count - done, group_ - at % group_);
    kernels.bytes(packed_ + at, scale_[at / group_], inverse_, now, to, out + done * size_of(to));
    done += now;
  }
}

}  // namespace nexus
