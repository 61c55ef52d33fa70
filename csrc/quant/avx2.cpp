#include <cstddef>
#include <cstdint>

#include "quant/scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")

namespace nexus {
namespace {

constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// As to_bfloat16; eight numbers in the low halves of eight words.
__m256i bfloat16_words(__m256 exact) {
  const __m256i bits = _mm256_castps_si256(exact);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(exact, exact, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
}

__m128i to_half(__m256 exact, Float to) {
  if (to == Float::k16) return _mm256_cvtps_ph(exact, kToNearest);
  const __m256i words = bfloat16_words(exact);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

// Sixteen 16-bit numbers, as their low and their high bytes: what a byte shuffle can look up.
struct Planes {
  __m128i low;
  __m128i high;
};

Planes planes_of(const float* code, float absmax, Float to) {
  const __m256 scale = _mm256_set1_ps(absmax);
  const __m128i first = to_half(_mm256_mul_ps(_mm256_loadu_ps(code), scale), to);
  const __m128i second = to_half(_mm256_mul_ps(_mm256_loadu_ps(code + 8), scale), to);
  const __m128i mask = _mm_set1_epi16(0xff);
  return {_mm_packus_epi16(_mm_and_si128(first, mask), _mm_and_si128(second, mask)),
          _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8))};
}

void put(std::byte* out, __m128i value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), value);
}

// 16 bytes of codes, 32 numbers.
void nibbles_to_half(const uint8_t* packed, const Planes& planes, std::byte* out) {
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m128i even = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
  const __m128i odd = _mm_and_si128(both, mask);
  const __m128i even_low = _mm_shuffle_epi8(planes.low, even);
  const __m128i even_high = _mm_shuffle_epi8(planes.high, even);
  const __m128i odd_low = _mm_shuffle_epi8(planes.low, odd);
  const __m128i odd_high = _mm_shuffle_epi8(planes.high, odd);
  const __m128i even_first = _mm_unpacklo_epi8(even_low, even_high);
  const __m128i even_second = _mm_unpackhi_epi8(even_low, even_high);
  const __m128i odd_first = _mm_unpacklo_epi8(odd_low, odd_high);
  const __m128i odd_second = _mm_unpackhi_epi8(odd_low, odd_high);
  put(out, _mm_unpacklo_epi16(even_first, odd_first));
  put(out + 16, _mm_unpackhi_epi16(even_first, odd_first));
  put(out + 32, _mm_unpacklo_epi16(even_second, odd_second));
  put(out + 48, _mm_unpackhi_epi16(even_second, odd_second));
}

// 4 bytes of codes, 8 numbers.
void nibbles_to_float(const uint8_t* packed, __m256 first, __m256 second, std::byte* out) {
  int32_t four;
  std::memcpy(&four, packed, 4);
  const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  const __m256i indices =
      _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
  const __m256 is_second = _mm256_castsi256_ps(_mm256_slli_epi32(indices, 28));
  _mm256_storeu_ps(reinterpret_cast<float*>(out),
                   _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, indices),
                                    _mm256_permutevar8x32_ps(second, indices), is_second));
}

void block(const uint8_t* packed, float absmax, const float* code, int64_t count, Float to,
           std::byte* out) {
  if (to == Float::k32) {
    const __m256 scale = _mm256_set1_ps(absmax);
    const __m256 first = _mm256_mul_ps(_mm256_loadu_ps(code), scale);
    const __m256 second = _mm256_mul_ps(_mm256_loadu_ps(code + 8), scale);
    for (int64_t j = 0; j < count; j += 8) {
      nibbles_to_float(packed + j / 2, first, second, out + 4 * j);
    }
    return;
  }
  const Planes planes = planes_of(code, absmax, to);
  for (int64_t j = 0; j < count; j += 32) nibbles_to_half(packed + j / 2, planes, out + 2 * j);
}

void nibbles(const uint8_t* packed, const float* absmax, const float* code, int64_t blocksize,
             int64_t count, Float to, bool, std::byte* out) {
  int64_t first = 0;
  for (; first + blocksize <= count; first += blocksize) {
    block(packed + first / 2, *absmax++, code, blocksize, to, out + first * size_of(to));
  }
  if (first == count) return;
  nibbles_of_block(packed + first / 2, *absmax, code, 0, count - first, to,
                   out + first * size_of(to));
}

void bytes(const int8_t* packed, float scale, float inverse, int64_t count, Float to,
           std::byte* out) {
  const __m256 scales = _mm256_set1_ps(scale);
  const __m256 inverses = _mm256_set1_ps(inverse);
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    const __m256i wide =
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + j)));
    const __m256 exact = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(wide), scales), inverses);
    if (to == Float::k32) {
      _mm256_storeu_ps(reinterpret_cast<float*>(out + 4 * j), exact);
    } else {
      put(out + 2 * j, to_half(exact, to));
    }
  }
  bytes_one_by_one(packed, scale, inverse, j, count, to, out);
}

__m256 widened(const std::byte* from, Float type) {
  if (type == Float::k32) return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  if (type == Float::k16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

float sum_of(__m256 numbers) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(numbers), _mm256_extractf128_ps(numbers, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

float dot(const std::byte* a, const std::byte* b, int64_t count, Float type) {
  const int64_t width = size_of(type);
  __m256 even = _mm256_setzero_ps();
  __m256 odd = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const int64_t at = i * width;
    const int64_t next = at + 8 * width;
    even = _mm256_fmadd_ps(widened(a + at, type), widened(b + at, type), even);
    odd = _mm256_fmadd_ps(widened(a + next, type), widened(b + next, type), odd);
  }
  return sum_of(_mm256_add_ps(even, odd)) + dot_one_by_one(a, b, i, count, type);
}

}  // namespace

const Codec kAvx2Codec = {"avx2", nibbles, bytes, dot, nullptr};

}  // namespace nexus
#endif
