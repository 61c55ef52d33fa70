// x @ W^T for few rows of x: each row of W is decoded where it is multiplied, in registers or in
// the first cache. Sums are float32; weights are rounded to the dtype of x, as decoding does.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "quant/codec.h"
#include "quant/packed.h"
#include "quant/scalar.h"

namespace nexus {

// x [count, width], row-major.
struct LinearInput {
  const std::byte* memory;
  int64_t count;
  int64_t width;
  Float type;
};

// A row decoded part by part into the first cache, and multiplied there.
template <typename Weight>
void add_products(const LinearInput& x, const Weight& weight, int64_t row, float* sums) {
  // The longest block, in the longest dtype.
  alignas(64) std::array<std::byte, 4096 * 4> part;
  const int64_t step = std::max<int64_t>(weight.unit(), 2048);
  const auto dot = codec().dot;
  const int64_t bytes = size_of(x.type);
  for (int64_t k = 0; k < x.width; k += step) {
    const int64_t count = std::min(step, x.width - k);
    weight.decode(row * x.width + k, count, x.type, false, part.data());
    for (int64_t m = 0; m < x.count; ++m) {
      sums[m] += dot(part.data(), x.memory + (m * x.width + k) * bytes, count, x.type);
    }
  }
}

// Rows [begin, end) of the weight; `out` and `bias` are in the dtype of x, `out` is
// [count, num_rows]. `shuffled` is x as `Weight::dots` wants it, or null if it has none.
template <typename Weight>
void multiply_rows(const LinearInput& x, const std::byte* shuffled, const Weight& weight,
                   int64_t begin, int64_t end, const std::byte* bias, int64_t num_rows,
                   std::byte* out) {
  const int64_t bytes = size_of(x.type);
  for (int64_t first = begin; first < end; first += kDotsRows) {
    const int64_t rows = std::min(kDotsRows, end - first);
    std::array<float, kDotsRows * kFusedInputs> sums{};
    if (shuffled != nullptr) {
      weight.dots(first, rows, x.width, shuffled, x.count, sums.data());
    } else {
      for (int64_t i = 0; i < rows; ++i)
        add_products(x, weight, first + i, &sums[static_cast<size_t>(i * x.count)]);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float shift = bias == nullptr ? 0 : load(x.type, bias + (first + i) * bytes);
      for (int64_t m = 0; m < x.count; ++m) {
        store(x.type, sums[static_cast<size_t>(i * x.count + m)] + shift,
              out + (m * num_rows + first + i) * bytes);
      }
    }
  }
}

}  // namespace nexus
