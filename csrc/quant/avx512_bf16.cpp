#include <cstddef>
#include <cstdint>

#include "quant/scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")

namespace nexus {
namespace {
constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
}  // namespace
}  // namespace nexus

#include "quant/avx512.h"

namespace nexus {
namespace {

// What the instruction gets wrong: it takes denormals for zero, and keeps the payload of a NaN.
constexpr int kNanOrDenormal = 0x01 | 0x80 | 0x20;

struct Rounding {
  static __m256i bfloat16(__m512 exact) {
    if (_mm512_fpclass_ps_mask(exact, kNanOrDenormal) != 0) return bfloat16_in_integers(exact);
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(exact));
  }
};

using Kernels = Avx512<Rounding>;

__m512bh pairs(const std::byte* from) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
}

float dot(const std::byte* a, const std::byte* b, int64_t count, Float type) {
  if (type != Float::kB16) return Kernels::dot(a, b, count, type);
  __m512 even = _mm512_setzero_ps();
  __m512 odd = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    even = _mm512_dpbf16_ps(even, pairs(a + 2 * i), pairs(b + 2 * i));
    odd = _mm512_dpbf16_ps(odd, pairs(a + 2 * i + 64), pairs(b + 2 * i + 64));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(even, odd)) + dot_one_by_one(a, b, i, count, type);
}

// Note [Nibbles as they lie]: a sum does not mind its order, so x is shuffled once, and a 16-bit
// word of packed codes is four indices without more than a shift. A permutation looks up in 32
// numbers: those of two blocks, chosen by the fifth bit.
constexpr int kAndOr = 0xea;  // (a & b) | c

// Both blocks' sixteen products, rounded.
__m512i two_tables(__m512 code, float first, float second) {
  const __m512 low = _mm512_mul_ps(code, _mm512_set1_ps(first));
  const __m512 high = _mm512_mul_ps(code, _mm512_set1_ps(second));
  return _mm512_inserti64x4(_mm512_castsi256_si512(Rounding::bfloat16(low)),
                            Rounding::bfloat16(high), 1);
}

template <int kInputs>
void nibble_dots_of(const uint8_t* packed, const float* absmax, const float* code,
                    int64_t blocksize, int64_t width, const std::byte* x, float* sums) {
  const __m512 codes = _mm512_loadu_ps(code);
  const __m512i nibble = _mm512_set1_epi16(15);
  const __m512i which = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  const bool shares = blocksize >= kDotsWidth;
  __m512 total[kInputs];
  for (int m = 0; m < kInputs; ++m) total[m] = _mm512_setzero_ps();
  for (int64_t k = 0; k < width; k += kDotsWidth) {
    const int64_t block = k / blocksize;
    const __m512i table = two_tables(codes, absmax[block], absmax[shares ? block : block + 1]);
    __m512i words = _mm512_loadu_si512(packed + k / 2);
    for (int part = 0; part < 4; ++part) {
      const __m512i indices = _mm512_ternarylogic_epi32(words, nibble, which, kAndOr);
      const auto weights = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(indices, table));
      for (int m = 0; m < kInputs; ++m) {
        total[m] = _mm512_dpbf16_ps(total[m], weights, pairs(x + 2 * (m * width + k) + 64 * part));
      }
      words = _mm512_srli_epi16(words, 4);
    }
  }
  for (int m = 0; m < kInputs; ++m) sums[m] = _mm512_reduce_add_ps(total[m]);
}

void nibble_dots(const uint8_t* packed, const float* absmax, const float* code, int64_t blocksize,
                 int64_t width, const std::byte* x, int64_t num_inputs, float* sums) {
  constexpr decltype(&nibble_dots_of<1>) kBy[kFusedInputs] = {
      nibble_dots_of<1>, nibble_dots_of<2>, nibble_dots_of<3>, nibble_dots_of<4>,
      nibble_dots_of<5>, nibble_dots_of<6>, nibble_dots_of<7>, nibble_dots_of<8>};
  kBy[num_inputs - 1](packed, absmax, code, blocksize, width, x, sums);
}

}  // namespace

const Codec kAvx512Bf16Codec = {"avx512bf16", Kernels::nibbles, Kernels::bytes, dot, nibble_dots};

}  // namespace nexus
#endif
