// The staging slots: page-aligned host memory that reads land in when they cannot land where they
// belong. One anonymous mapping of exactly the size asked for, divided evenly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace nexus {

class Staging {
 public:
  // Slots are `slot_bytes` each, rounded up to whole pages.
  Staging(int num_slots, int64_t slot_bytes);
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  std::byte* slot(int index) const { return base_ + index * stride_; }
  std::span<std::byte> memory() const { return {base_, static_cast<size_t>(nbytes_)}; }
  int64_t nbytes() const { return nbytes_; }
  int64_t stride() const { return stride_; }
  int num_slots() const { return static_cast<int>(nbytes_ / stride_); }

 private:
  int64_t stride_;
  int64_t nbytes_;
  std::byte* base_;
};

}  // namespace nexus
