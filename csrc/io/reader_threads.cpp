// pread from worker threads: the rung that works everywhere, and the oracle for the others.
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <memory>

#include "io/pool.h"

#ifndef RWF_DONTCACHE
#define RWF_DONTCACHE 0x00000080
#endif

namespace nexus {
namespace {

int64_t read_plain(const Request& request, int flags) {
  const iovec target = {request.buffer, static_cast<size_t>(request.nbytes)};
  const ssize_t count = preadv2(request.file->descriptor(), &target, 1, request.offset, flags);
  return count < 0 ? -errno : count;
}

// A buffered read that leaves no pages behind. RWF_DONTCACHE (Linux 6.14) does it in one call;
// file systems without it answer EOPNOTSUPP, and the pages are dropped afterwards instead.
class TrailingDrop {
 public:
  int64_t operator()(const Request& request) {
    if (request.file->is_direct()) return read_plain(request, 0);
    if (dontcache_.load(std::memory_order_relaxed)) {
      const int64_t count = read_plain(request, RWF_DONTCACHE);
      if (count != -EOPNOTSUPP && count != -EINVAL) return count;
      dontcache_ = false;
    }
    const int64_t count = read_plain(request, 0);
    if (count > 0) request.file->drop(request.offset, count);
    return count;
  }

 private:
  std::atomic<bool> dontcache_ = true;
};

}  // namespace

std::unique_ptr<Reader> make_threads_reader(int depth, bool trailing_drop) {
  if (!trailing_drop) {
    return std::make_unique<PoolReader>(
        depth, "threads", [](const Request& request) { return read_plain(request, 0); });
  }
  auto drop = std::make_shared<TrailingDrop>();
  return std::make_unique<PoolReader>(depth, "threads",
                                      [drop](const Request& request) { return (*drop)(request); });
}

}  // namespace nexus
