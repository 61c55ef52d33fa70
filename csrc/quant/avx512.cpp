#include <cstddef>
#include <cstdint>

#include "quant/scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")

namespace nexus {
namespace {
constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
}  // namespace
}  // namespace nexus

#include "quant/avx512.h"

namespace nexus {
namespace {

struct Rounding {
  static __m256i bfloat16(__m512 exact) { return bfloat16_in_integers(exact); }
};

using Kernels = Avx512<Rounding>;

}  // namespace

const Codec kAvx512Codec = {"avx512", Kernels::nibbles, Kernels::bytes, Kernels::dot, nullptr};

}  // namespace nexus
#endif
