#include "quant/codec.h"

#include <atomic>
#include <vector>

#include "common/error.h"

namespace nexus {
namespace {

// From the slowest to the fastest.
std::vector<const Codec*> available() {
  std::vector<const Codec*> found = {&kScalarCodec};
#if defined(__x86_64__)
  const auto has_all = [](auto... has) { return (has && ...); };
  if (has_all(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"),
              __builtin_cpu_supports("f16c"))) {
    found.push_back(&kAvx2Codec);
    if (has_all(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
                __builtin_cpu_supports("avx512vl"), __builtin_cpu_supports("avx512dq"))) {
      found.push_back(&kAvx512Codec);
      if (__builtin_cpu_supports("avx512bf16")) found.push_back(&kAvx512Bf16Codec);
    }
  }
#endif
  return found;
}

std::atomic<const Codec*>& chosen() {
  static std::atomic<const Codec*> codec{available().back()};
  return codec;
}

}  // namespace

void shuffle_for_dots(const uint16_t* row, int64_t width, uint16_t* out) {
  for (int64_t first = 0; first < width; first += kDotsWidth) {
    for (const int start : {1, 0, 3, 2}) {
      for (int64_t i = start; i < kDotsWidth; i += 4) *out++ = row[first + i];
    }
  }
}

const Codec& codec() { return *chosen().load(std::memory_order_relaxed); }

std::string use_codec(const std::string& name) {
  const std::vector<const Codec*> choice = available();
  if (name == "auto") {
    chosen() = choice.back();
    return choice.back()->name;
  }
  std::string names;
  for (const Codec* candidate : choice) {
    if (name == candidate->name) {
      chosen() = candidate;
      return name;
    }
    names += std::string(names.empty() ? "" : ", ") + candidate->name;
  }
  fail("ConfigError", "A codec must be one that this machine has, got \"", name,
       "\"; use \"auto\", or one of: ", names, ".");
}

}  // namespace nexus
