// The fault hook: a reader around a reader that answers some requests wrongly, on purpose and
// reproducibly. Compiled in, off by default; it is how the tests reach every error path.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "io/reader.h"

namespace nexus {

// Chances are in millionths of a request, and exclude each other in this order.
struct FaultPlan {
  int64_t seed = 0;
  int64_t errno_ppm = 0;   // EIO
  int64_t again_ppm = 0;   // EAGAIN, EINTR
  int64_t short_ppm = 0;   // fewer bytes than asked for
  int64_t delay_ppm = 0;   // not a byte comes before the delay is over, and others overtake
  int64_t flip_ppm = 0;    // one bit differs
  int64_t delay_us = 0;    // longest delay
  int64_t refuse_ppm = 0;  // EINVAL, as a file system answers that takes no direct reads
};

// Written by the thread that calls the reader, read by any.
struct FaultCounts {
  std::atomic<int64_t> errors = 0;
  std::atomic<int64_t> retries = 0;
  std::atomic<int64_t> shorts = 0;
  std::atomic<int64_t> delays = 0;
  std::atomic<int64_t> flips = 0;
  std::atomic<int64_t> refusals = 0;
};

std::unique_ptr<Reader> make_faulty_reader(std::unique_ptr<Reader> inner, const FaultPlan& plan,
                                           FaultCounts* counts);

}  // namespace nexus
