#include <bit>
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

// Whether the instruction rounds every product right, but for codes that are tiny themselves.
bool all_are_normal(const float* absmax, int64_t count) {
  const __m512 low = _mm512_set1_ps(0x1p-100f);
  const __m512 high = _mm512_set1_ps(0x1p+100f);
  __mmask16 found = 0xffff;
  for (int64_t i = 0; i < count; i += 16) {
    const auto rest = static_cast<unsigned>(count - i);
    const auto some = static_cast<__mmask16>(rest >= 16 ? 0xffff : (1u << rest) - 1);
    const __m512 scales = _mm512_mask_loadu_ps(_mm512_set1_ps(1), some, absmax + i);
    found &=
        _mm512_cmp_ps_mask(scales, low, _CMP_GT_OQ) & _mm512_cmp_ps_mask(scales, high, _CMP_LT_OQ);
  }
  return found == 0xffff;
}

// Both blocks' sixteen products, rounded.
template <bool kNormal>
__m512i two_tables(__m512 code, float first, float second) {
  const __m512 low = _mm512_mul_ps(code, _mm512_set1_ps(first));
  const __m512 high = _mm512_mul_ps(code, _mm512_set1_ps(second));
  if constexpr (kNormal) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  } else {
    return _mm512_inserti64x4(_mm512_castsi256_si512(bfloat16_in_integers(low)),
                              bfloat16_in_integers(high), 1);
  }
}

// Rows of codes, and what belongs to them.
struct Rows {
  const uint8_t* packed;
  const float* absmax;
  int64_t width;
  int shift;     // of the blocksize
  int64_t next;  // from the scale of the first half of kDotsWidth to that of the second
};

template <int kRows, int kInputs, bool kNormal>
void dots_of(const Rows& rows, __m512 code, const std::byte* x, float* sums) {
  const __m512i nibble = _mm512_set1_epi16(15);
  const __m512i which = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  const int64_t width = rows.width;
  __m512 total[kRows][kInputs];
  for (auto& row : total) {
    for (__m512& sum : row) sum = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < width; k += kDotsWidth) {
    __m512i tables[kRows];
    __m512i words[kRows];
    for (int row = 0; row < kRows; ++row) {
      const float* scale = rows.absmax + (row * (width >> rows.shift) + (k >> rows.shift));
      tables[row] = two_tables<kNormal>(code, scale[0], scale[rows.next]);
      words[row] = _mm512_loadu_si512(rows.packed + (row * width + k) / 2);
    }
    for (int part = 0; part < 4; ++part) {
      __m512bh inputs[kInputs];
      for (int m = 0; m < kInputs; ++m) inputs[m] = pairs(x + 2 * (m * width + k) + 64 * part);
      for (int row = 0; row < kRows; ++row) {
        const __m512i indices = _mm512_ternarylogic_epi32(words[row], nibble, which, kAndOr);
        words[row] = _mm512_srli_epi16(words[row], 4);
        const auto weights =
            reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(indices, tables[row]));
        for (int m = 0; m < kInputs; ++m) {
          total[row][m] = _mm512_dpbf16_ps(total[row][m], weights, inputs[m]);
        }
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int m = 0; m < kInputs; ++m) {
      sums[row * kInputs + m] = _mm512_reduce_add_ps(total[row][m]);
    }
  }
}

template <int kInputs, bool kNormal>
void all_dots(Rows rows, __m512 code, int64_t num_rows, const std::byte* x, float* sums) {
  // Several rows at a time hide the latency of a sum; more would not fit in the registers.
  constexpr int kRows = kInputs <= 2 ? 4 : kInputs <= 4 ? 2 : 1;
  const int64_t blocks = rows.width >> rows.shift;
  const auto go_on = [&](int64_t done) {
    rows.packed += done * rows.width / 2;
    rows.absmax += done * blocks;
    sums += done * kInputs;
    num_rows -= done;
  };
  for (; num_rows >= kRows; go_on(kRows)) dots_of<kRows, kInputs, kNormal>(rows, code, x, sums);
  for (; num_rows > 0; go_on(1)) dots_of<1, kInputs, kNormal>(rows, code, x, sums);
}

template <int kInputs>
void nibble_dots_of(const Rows& rows, const float* code, int64_t num_rows, const std::byte* x,
                    float* sums) {
  const __m512 codes = _mm512_loadu_ps(code);
  if (all_are_normal(rows.absmax, num_rows * (rows.width >> rows.shift))) {
    all_dots<kInputs, true>(rows, codes, num_rows, x, sums);
  } else {
    all_dots<kInputs, false>(rows, codes, num_rows, x, sums);
  }
}

constexpr decltype(&nibble_dots_of<1>) kDotsBy[kFusedInputs] = {
    nibble_dots_of<1>, nibble_dots_of<2>, nibble_dots_of<3>, nibble_dots_of<4>,
    nibble_dots_of<5>, nibble_dots_of<6>, nibble_dots_of<7>, nibble_dots_of<8>};

void nibble_dots(const uint8_t* packed, const float* absmax, const float* code, int64_t blocksize,
                 int64_t width, int64_t num_rows, const std::byte* x, int64_t num_inputs,
                 float* sums) {
  const int shift = std::countr_zero(static_cast<uint64_t>(blocksize));
  const Rows rows{packed, absmax, width, shift, blocksize < kDotsWidth ? 1 : 0};
  kDotsBy[num_inputs - 1](rows, code, num_rows, x, sums);
}

}  // namespace

const Codec kAvx512Bf16Codec = {"avx512bf16", Kernels::nibbles, Kernels::bytes, dot, nibble_dots};

}  // namespace nexus
#endif
