// Page-locked host memory: what a device copies from while everything else goes on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "device/device.h"
#include "io/staging.h"

namespace nexus {

// Keeps `memory` (whole pages) page-locked for a device; both must outlive it.
//
// It is locked in parts of whole units, because one call that locks much stops every other call of
// the driver meanwhile. No copy may reach from one part into the next.
class PinnedLock {
 public:
  // Touches the pages in parallel, then locks them. Throws when the device refuses; then nothing is
  // locked.
  PinnedLock(Device& device, std::span<std::byte> memory, int64_t unit_bytes);
  ~PinnedLock();
  PinnedLock(const PinnedLock&) = delete;
  PinnedLock& operator=(const PinnedLock&) = delete;

 private:
  void unlock() noexcept;

  Device& device_;
  std::vector<std::byte*> parts_;
};

// One group's bytes in page-locked memory: read once, copied to the device from then on.
class RamCopy {
 public:
  // Long enough that copies of this size lose nothing, short enough to lock.
  static constexpr int64_t kUnitBytes = 256 << 20;

  // `data()` lies `phase` bytes behind a page boundary, so that reads can land there directly.
  RamCopy(Device& device, int64_t nbytes, int64_t phase)
      : memory_(1, nbytes + phase), lock_(device, memory_.memory(), kUnitBytes), phase_(phase) {}

  std::byte* data() const { return memory_.slot(0) + phase_; }
  // How many of the group's bytes from `offset` on one copy may take.
  int64_t num_together(int64_t offset) const { return kUnitBytes - (offset + phase_) % kUnitBytes; }
  int64_t nbytes() const { return memory_.nbytes(); }

  // All of the group stands here.
  bool is_filled = false;

 private:
  Staging memory_;
  PinnedLock lock_;
  int64_t phase_;
};

}  // namespace nexus
