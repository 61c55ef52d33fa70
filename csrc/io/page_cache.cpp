#include "io/page_cache.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <thread>
#include <vector>

#include "common/align.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

namespace nexus {
namespace {

constexpr int64_t kPageBytes = 4096;
// One madvise call per job: long enough to amortise it, short enough to spread over threads.
constexpr int64_t kJobBytes = 32 << 20;
constexpr long kSysCachestat = 451;

struct CachestatRange {
  uint64_t offset;
  uint64_t nbytes;
};

struct Cachestat {
  uint64_t num_cached;
  uint64_t num_dirty;
  uint64_t num_writeback;
  uint64_t num_evicted;
  uint64_t num_recently_evicted;
};

void touch_pages(const std::byte* begin, int64_t nbytes) {
  // volatile: the loads are the point, their values are not.
  const volatile std::byte* page = begin;
  for (int64_t i = 0; i < nbytes; i += kPageBytes) (void)page[i];
  if (nbytes > 0) (void)page[nbytes - 1];
}

}  // namespace

int populate(const std::byte* begin, int64_t nbytes) {
  auto address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = address & ~static_cast<uintptr_t>(kPageBytes - 1);
  const size_t length = static_cast<size_t>(nbytes) + (address - first);
  while (madvise(reinterpret_cast<void*>(first), length, MADV_POPULATE_READ) != 0) {
    if (errno == EINTR || errno == EAGAIN) continue;
    if (errno != EINVAL) return errno;
    touch_pages(begin, nbytes);
    break;
  }
  return 0;
}

int64_t populate_parallel(const std::byte* begin, int64_t nbytes, int num_threads,
                          const volatile bool* cancel) {
  std::atomic<int64_t> next = 0;
  std::atomic<int64_t> present = 0;
  auto sweep = [&] {
    for (int64_t job = next++ * kJobBytes; job < nbytes && !*cancel; job = next++ * kJobBytes) {
      const int64_t length = std::min(kJobBytes, nbytes - job);
      if (populate(begin + job, length) != 0) continue;
      // Under a hypervisor a page has a second table, which only a touch fills: without it the
      // first forward took three times a warm one (measured in a virtual machine).
      touch_pages(begin + job, length);
      present += length;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < num_threads; ++i) threads.emplace_back(sweep);
  sweep();
  for (std::thread& thread : threads) thread.join();
  return present;
}

int64_t cached_bytes(int descriptor, int64_t size) {
  CachestatRange range = {0, static_cast<uint64_t>(size)};
  Cachestat info = {};
  if (syscall(kSysCachestat, descriptor, &range, &info, 0) == 0) {
    return std::min(size, static_cast<int64_t>(info.num_cached) * kPageBytes);
  }
  void* map = mmap(nullptr, static_cast<size_t>(size), PROT_READ, MAP_SHARED, descriptor, 0);
  if (map == MAP_FAILED) return -1;
  std::vector<unsigned char> pages(static_cast<size_t>((size + kPageBytes - 1) / kPageBytes));
  const bool known = mincore(map, static_cast<size_t>(size), pages.data()) == 0;
  munmap(map, static_cast<size_t>(size));
  if (!known) return -1;
  const auto present =
      std::count_if(pages.begin(), pages.end(), [](unsigned char page) { return (page & 1) != 0; });
  return std::min(size, static_cast<int64_t>(present) * kPageBytes);
}

}  // namespace nexus
