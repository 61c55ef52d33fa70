#include "quant/encode.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "quant/scalar.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NEXUS_FOR_ALL_CPUS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define NEXUS_FOR_ALL_CPUS
#endif

namespace nexus {
namespace {

constexpr int64_t kLargestBlock = 4096;

// Half-way between neighbouring codes, rounded to float32; what is equal belongs to the lower one.
// Computed: a literal with an f is rounded once, and in Python it would be twice.
constexpr std::array<float, 15> kThresholds = [] {
  std::array<float, 15> found{};
  for (size_t i = 0; i < found.size(); ++i) {
    found[i] = (kNormalFloat[i] + kNormalFloat[i + 1]) / 2;
  }
  return found;
}();

NEXUS_FOR_ALL_CPUS float largest(const float* numbers, int64_t count) {
  float found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float size = std::fabs(numbers[i]);
    found = size > found ? size : found;
  }
  return found;
}

// How many thresholds lie below each number.
NEXUS_FOR_ALL_CPUS void codes_of(const float* numbers, float factor, int64_t count,
                                 int32_t* codes) {
  for (int64_t i = 0; i < count; ++i) {
    const float share = numbers[i] * factor;
    int32_t code = 0;
    for (const float threshold : kThresholds) code += share > threshold;
    codes[i] = code;
  }
}

NEXUS_FOR_ALL_CPUS float squared_error(const float* numbers, const int32_t* codes, float scale,
                                       int64_t count) {
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float difference = kNormalFloat[static_cast<size_t>(codes[i])] * scale - numbers[i];
    sum += difference * difference;
  }
  return sum;
}

// A few numbers that are cut off may be worth it, if all the others are met better.
float best_scale(const float* numbers, int64_t count, float absmax, int64_t num_scales) {
  std::array<int32_t, kLargestBlock> codes;
  float best = absmax;
  float smallest = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < num_scales; ++i) {
    const double part = static_cast<double>(i) / static_cast<double>(num_scales);
    const float scale = absmax * static_cast<float>(1 - (1 - kSmallestShare) * part);
    const float factor = 1.0f / scale;
    if (!std::isfinite(factor)) break;
    codes_of(numbers, factor, count, codes.data());
    const float error = squared_error(numbers, codes.data(), scale, count);
    if (error < smallest) {
      smallest = error;
      best = scale;
    }
  }
  return best;
}

void encode_block(const float* numbers, int64_t count, float absmax, uint8_t* packed) {
  std::array<int32_t, kLargestBlock> codes;
  const float factor = 1.0f / absmax;
  if (std::isfinite(factor)) {
    codes_of(numbers, factor, count, codes.data());
  } else {
    // Nothing but zeros, or so small that the factor overflows: then the quotient is exact enough.
    std::array<float, kLargestBlock> shares{};
    if (absmax > 0) {
      for (int64_t i = 0; i < count; ++i) shares[static_cast<size_t>(i)] = numbers[i] / absmax;
    }
    codes_of(shares.data(), 1.0f, count, codes.data());
  }
  for (int64_t i = 0; i + 1 < count; i += 2) {
    packed[i / 2] = static_cast<uint8_t>(codes[static_cast<size_t>(i)] << 4 |
                                         codes[static_cast<size_t>(i + 1)]);
  }
  if (count % 2 != 0) {
    packed[count / 2] = static_cast<uint8_t>(codes[static_cast<size_t>(count - 1)] << 4);
  }
}

}  // namespace

bool encode_nf4(const std::byte* numbers, Float type, int64_t blocksize, int64_t num_scales,
                int64_t count, uint8_t* packed, float* absmax) {
  std::array<float, kLargestBlock> block;
  for (int64_t first = 0; first < count; first += blocksize) {
    const int64_t now = std::min(blocksize, count - first);
    bool is_finite = true;
    for (int64_t i = 0; i < now; ++i) {
      const float number = load(type, numbers + (first + i) * size_of(type));
      is_finite &= std::isfinite(number);
      block[static_cast<size_t>(i)] = number;
    }
    if (!is_finite) return false;
    *absmax = largest(block.data(), now);
    if (num_scales > 1) *absmax = best_scale(block.data(), now, *absmax, num_scales);
    encode_block(block.data(), now, *absmax, packed + first / 2);
    ++absmax;
  }
  return true;
}

}  // namespace nexus
