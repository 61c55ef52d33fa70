#include "common/recycler.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "common/align.h"

namespace nexus {
namespace {

constexpr int64_t kHugePage = 2 << 20;

struct Idle {
  std::byte* memory;
  int64_t nbytes;
};

class Recycler {
 public:
  std::byte* take(int64_t nbytes) {
    {
      const std::lock_guard lock(mutex_);
      for (size_t i = idle_.size(); i-- > 0;) {
        if (idle_[i].nbytes != nbytes) continue;
        std::byte* found = idle_[i].memory;
        idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(i));
        kept_ -= nbytes;
        return found;
      }
    }
    void* fresh = std::aligned_alloc(kHugePage, static_cast<size_t>(nbytes));
    if (fresh == nullptr) throw std::bad_alloc();
    madvise(fresh, static_cast<size_t>(nbytes), MADV_HUGEPAGE);  // a wish
    return static_cast<std::byte*>(fresh);
  }

  void give_back(std::byte* memory, int64_t nbytes) {
    std::vector<Idle> dropped;
    {
      const std::lock_guard lock(mutex_);
      idle_.push_back({memory, nbytes});
      kept_ += nbytes;
      while (kept_ > kKeptBytes) {
        dropped.push_back(idle_.front());
        kept_ -= idle_.front().nbytes;
        idle_.erase(idle_.begin());
      }
    }
    for (const Idle& idle : dropped) std::free(idle.memory);
  }

 private:
  std::mutex mutex_;
  std::vector<Idle> idle_;  // given back in this order
  int64_t kept_ = 0;
};

// Never destroyed: tensors may outlive static objects.
Recycler& recycler() {
  static auto* const made = new Recycler;
  return *made;
}

}  // namespace

Block recycled_block(int64_t nbytes) {
  const int64_t size = align_up(nbytes, kHugePage);
  return {recycler().take(size), [size](std::byte* memory) { recycler().give_back(memory, size); }};
}

}  // namespace nexus
