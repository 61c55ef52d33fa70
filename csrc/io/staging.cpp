#include "io/staging.h"

#include <sys/mman.h>

#include "common/align.h"
#include "common/error.h"

namespace nexus {
namespace {
constexpr int64_t kPageBytes = 4096;
}

Staging::Staging(int num_slots, int64_t slot_bytes)
    : stride_(align_up(slot_bytes, kPageBytes)), nbytes_(stride_ * num_slots) {
  void* address = mmap(nullptr, static_cast<size_t>(nbytes_), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) {
    fail("EngineError", "Staging needs ", nbytes_,
         " bytes of host memory and got none. Lower ram_budget.");
  }
  madvise(address, static_cast<size_t>(nbytes_), MADV_HUGEPAGE);  // a hint
  base_ = static_cast<std::byte*>(address);
}

Staging::~Staging() { munmap(base_, static_cast<size_t>(nbytes_)); }

}  // namespace nexus
