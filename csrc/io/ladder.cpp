#include "io/ladder.h"

#include <algorithm>

#include "common/error.h"

namespace nexus {
namespace {

// 16 MiB in flight saturates every disk measured; deeper queues only delay what is urgent.
constexpr int kUringDepth = kLargestDefaultDepth;
// A thread is a stack and a wake-up; eight keep an NVMe disk busy with 1 MiB reads.
constexpr int kThreadsDepth = 8;
// Page cache copies are bound by memory, not by the number of requests.
constexpr int kMmapDepth = 2;

// More than any file system's alignment, so that every chunk holds whole units.
constexpr int64_t kSmallestChunk = 64 << 10;
// One read of Linux ends 4096 bytes before 2 GiB.
constexpr int64_t kLargestChunk = 1 << 30;

constexpr int kLargestDepth = 1024;

void check_mode(const ReadMode& mode) {
  if (mode.chunk_bytes < kSmallestChunk || mode.chunk_bytes > kLargestChunk) {
    fail("ConfigError", "chunk_bytes must lie in ", kSmallestChunk, "..", kLargestChunk, ", got ",
         mode.chunk_bytes, ".");
  }
  if (mode.depth < 0 || mode.depth > kLargestDepth) {
    fail("ConfigError", "depth must lie in 0..", kLargestDepth, " (0: the reader's default), got ",
         mode.depth, ".");
  }
}

// A page of a hole would be mapped as zeros, and kvikio knows of no gate.
void check_whole(const std::vector<std::unique_ptr<File>>& files, const ReadMode& mode) {
  if (mode.io != "mmap" && mode.io != "gds") return;
  for (const auto& file : files) {
    if (file->arrived().is_whole()) continue;
    fail("ConfigError", "io=\"", mode.io, "\" needs files that are whole, and ", file->path(),
         " still arrives. Use io=\"direct\" or io=\"buffered\", or wait until it is there.");
  }
}

int depth_or(const ReadMode& mode, int standard) { return mode.depth > 0 ? mode.depth : standard; }

}  // namespace

Rung prepare_files(const std::vector<std::unique_ptr<File>>& files, const ReadMode& mode) {
  check_mode(mode);
  check_whole(files, mode);
  Rung rung;
  rung.io = mode.io;
  if (mode.io == "mmap") {
    for (const auto& file : files) file->enable_mapping();
  } else if (mode.io == "direct" || mode.io == "gds") {
    for (const auto& file : files) {
      if (file->enable_direct()) continue;
      if (mode.io == "direct") rung.io = "buffered";
      rung.refusal = concat("O_DIRECT is refused for ", file->path(), ": ", file->refusal());
    }
  } else if (mode.io != "buffered") {
    fail("ConfigError", "io must be \"direct\", \"buffered\", \"mmap\" or \"gds\", got \"", mode.io,
         "\".");
  }
  return rung;
}

void make_reader(Rung& rung, const ReadMode& mode, const Buffers& buffers) {
  if (rung.io == "mmap") {
    rung.reader = make_mmap_reader(depth_or(mode, kMmapDepth), mode.trailing_drop);
    return;
  }
  if (rung.io != "buffered" && mode.allow_uring) {
    rung.reader = make_uring_reader(depth_or(mode, kUringDepth), buffers, rung.refusal);
    if (rung.reader != nullptr) return;
  }
  rung.reader = make_threads_reader(depth_or(mode, kThreadsDepth), mode.trailing_drop);
}

}  // namespace nexus
