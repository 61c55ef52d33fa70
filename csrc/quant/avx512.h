// The 512-bit kernels, for two kinds of machine: `Rounding` says how 16 numbers become bfloat16.
// Included behind a `#pragma GCC target`; whatever may be shared with other code is included
// before.
//
// Note [Sixteen products]: a block has one scale and sixteen codes, so only sixteen different
// results. They are made and rounded once, and a permutation picks them by nibble: per element
// there is neither a multiplication nor a rounding left.
#pragma once

// GCC 12 warns of the registers that its own intrinsics leave undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace nexus {
namespace {

template <typename Rounding>
struct Avx512 {
  // 32 nibbles in the order of their elements, as 16-bit indices of which the low five bits count.
  // Bit 4 is dirt: the table repeats itself.
  static __m512i indices_of(const uint8_t* packed) {
    const __m512i bytes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    return _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
  }

  static __m512i products(__m512 code, float absmax, Float to) {
    const __m512 exact = _mm512_mul_ps(code, _mm512_set1_ps(absmax));
    return _mm512_broadcast_i64x4(to == Float::kB16 ? Rounding::bfloat16(exact)
                                                    : _mm512_cvtps_ph(exact, kToNearest));
  }

  template <bool kPastCache>
  static void put(std::byte* out, __m512i value) {
    if constexpr (kPastCache) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), value);
    } else {
      _mm512_storeu_si512(out, value);
    }
  }

  template <bool kPastCache>
  static void block_to_half(const uint8_t* packed, __m512i products, int64_t count,
                            std::byte* out) {
    for (int64_t j = 0; j < count; j += 32) {
      put<kPastCache>(out + 2 * j, _mm512_permutexvar_epi16(indices_of(packed + j / 2), products));
    }
  }

  template <bool kPastCache>
  static void block_to_float(const uint8_t* packed, __m512 products, int64_t count,
                             std::byte* out) {
    for (int64_t j = 0; j < count; j += 16) {
      const __m512i bytes =
          _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + j / 2)));
      const __m512i indices =
          _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
      put<kPastCache>(out + 4 * j, _mm512_castps_si512(_mm512_permutexvar_ps(indices, products)));
    }
  }

  template <bool kPastCache>
  static void blocks(const uint8_t* packed, const float* absmax, const float* code,
                     int64_t blocksize, int64_t num_blocks, Float to, std::byte* out) {
    const __m512 codes = _mm512_loadu_ps(code);
    const int64_t out_bytes = blocksize * size_of(to);
    for (int64_t block = 0; block < num_blocks; ++block) {
      if (to == Float::k32) {
        const __m512 exact = _mm512_mul_ps(codes, _mm512_set1_ps(absmax[block]));
        block_to_float<kPastCache>(packed, exact, blocksize, out);
      } else {
        block_to_half<kPastCache>(packed, products(codes, absmax[block], to), blocksize, out);
      }
      packed += blocksize / 2;
      out += out_bytes;
    }
  }

  static void nibbles(const uint8_t* packed, const float* absmax, const float* code,
                      int64_t blocksize, int64_t count, Float to, bool past_cache, std::byte* out) {
    const int64_t num_blocks = count / blocksize;
    const bool is_aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0;
    if (past_cache && is_aligned) {
      blocks<true>(packed, absmax, code, blocksize, num_blocks, to, out);
      _mm_sfence();
    } else {
      blocks<false>(packed, absmax, code, blocksize, num_blocks, to, out);
    }
    const int64_t done = num_blocks * blocksize;
    if (done == count) return;
    nibbles_of_block(packed + done / 2, absmax[num_blocks], code, 0, count - done, to,
                     out + done * size_of(to));
  }

  static void bytes(const int8_t* packed, float scale, float inverse, int64_t count, Float to,
                    std::byte* out) {
    const __m512 scales = _mm512_set1_ps(scale);
    const __m512 inverses = _mm512_set1_ps(inverse);
    int64_t j = 0;
    for (; j + 16 <= count; j += 16) {
      const __m512 exact = _mm512_mul_ps(
          _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
                            _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + j)))),
                        scales),
          inverses);
      if (to == Float::k32) {
        _mm512_storeu_ps(out + 4 * j, exact);
      } else {
        const __m256i half =
            to == Float::kB16 ? Rounding::bfloat16(exact) : _mm512_cvtps_ph(exact, kToNearest);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2 * j), half);
      }
    }
    bytes_one_by_one(packed, scale, inverse, j, count, to, out);
  }

  static __m512 widened(const std::byte* from, Float type) {
    if (type == Float::k32) return _mm512_loadu_ps(from);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if (type == Float::k16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }

  static float dot(const std::byte* a, const std::byte* b, int64_t count, Float type) {
    const int64_t width = size_of(type);
    __m512 even = _mm512_setzero_ps();
    __m512 odd = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
      const int64_t at = i * width;
      even = _mm512_fmadd_ps(widened(a + at, type), widened(b + at, type), even);
      const int64_t next = at + 16 * width;
      odd = _mm512_fmadd_ps(widened(a + next, type), widened(b + next, type), odd);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(even, odd)) + dot_one_by_one(a, b, i, count, type);
  }
};

// In integers, as to_bfloat16 does.
inline __m256i bfloat16_in_integers(__m512 exact) {
  const __m512i bits = _mm512_castps_si512(exact);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(exact, exact, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
}

}  // namespace
}  // namespace nexus
