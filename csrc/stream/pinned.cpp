#include "stream/pinned.h"

#include <algorithm>
#include <atomic>
#include <thread>

namespace nexus {
namespace {

constexpr int64_t kPageBytes = 4096;
// Of one part, about.
constexpr int64_t kPartBytes = 256 << 20;
// Fresh pages are zeroed by the kernel: more threads are as fast as memory from here on.
constexpr int kMostThreads = 8;
constexpr int64_t kTouchBytes = 4 << 20;

// Locking takes one page after the other from the kernel; touched before, they come in parallel.
void touch_parallel(std::span<std::byte> memory) {
  const auto nbytes = static_cast<int64_t>(memory.size());
  std::atomic<int64_t> next = 0;
  auto touch = [&] {
    for (int64_t job = next++ * kTouchBytes; job < nbytes; job = next++ * kTouchBytes) {
      const int64_t end = std::min(nbytes, job + kTouchBytes);
      // volatile: the store is the point.
      for (int64_t at = job; at < end; at += kPageBytes) {
        *const_cast<volatile std::byte*>(memory.data() + at) = std::byte{0};
      }
    }
  };
  const int64_t jobs = (nbytes + kTouchBytes - 1) / kTouchBytes;
  const int64_t processors = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < std::min<int64_t>({jobs, processors, kMostThreads}); ++i) {
    threads.emplace_back(touch);
  }
  touch();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

PinnedLock::PinnedLock(Device& device, std::span<std::byte> memory, int64_t unit_bytes)
    : device_(device) {
  touch_parallel(memory);
  const auto part = static_cast<size_t>(std::max<int64_t>(1, kPartBytes / unit_bytes) * unit_bytes);
  try {
    for (size_t begin = 0; begin < memory.size(); begin += part) {
      device_.pin(memory.subspan(begin, std::min(part, memory.size() - begin)));
      parts_.push_back(memory.data() + begin);
    }
  } catch (...) {
    unlock();
    throw;
  }
}

PinnedLock::~PinnedLock() { unlock(); }

void PinnedLock::unlock() noexcept {
  for (std::byte* part : parts_) device_.unpin(part);
  parts_.clear();
}

}  // namespace nexus
