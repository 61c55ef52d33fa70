// XXH3, 64 bits, seed 0, default secret: the content hash of every file that nexus_ext writes.
//
// Owns the hash and nothing else. It follows the public XXH3 specification (doc/xxhash_spec.md of
// the xxHash project, "XXH3 Algorithm Description"), so any other XXH3 library gives the same
// number. It detects damage and accident; it is not cryptographic and proves nothing about intent.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace nexus {

// The hash of `nbytes` at `data`. `data` may be null when `nbytes` is 0.
uint64_t xxh3_64(const void* data, size_t nbytes);

// The hash of bytes that arrive in pieces.
//
// Any split of the same bytes gives the value of `xxh3_64` on their concatenation. `digest` ends
// nothing: more bytes may follow. Copyable; not thread-safe.
//
//   buffer_  [ 64: the stripe before | 0..1024 pending: the block not yet accumulated ]
//
// A block is accumulated only when a byte after it is known, because the last block is treated
// differently. The stripe before is kept because the last 64 bytes of a message are hashed once
// more: they always end where the pending bytes end, even when fewer than 64 are pending.
class Xxh3 {
 public:
  Xxh3();

  void update(const void* data, size_t nbytes);
  [[nodiscard]] uint64_t digest() const;

  static constexpr size_t kNumLanes = 8;
  static constexpr size_t kStripeBytes = kNumLanes * sizeof(uint64_t);
  // (192 secret bytes - 64) / 8 stripes use up the default secret.
  static constexpr size_t kBlockBytes = 16 * kStripeBytes;

  using Lanes = std::array<uint64_t, kNumLanes>;

 private:
  // Both say how many of the bytes they took, and leave nothing pending.
  size_t take_blocks(const uint8_t* data, size_t nbytes);
  size_t complete_pending(const uint8_t* data);
  void remember_stripe_before(const uint8_t* end);

  [[nodiscard]] const uint8_t* pending() const { return buffer_.data() + kStripeBytes; }
  [[nodiscard]] uint8_t* pending() { return buffer_.data() + kStripeBytes; }

  alignas(kStripeBytes) Lanes lanes_;
  std::array<uint8_t, kStripeBytes + kBlockBytes> buffer_{};
  size_t num_pending_ = 0;
  uint64_t total_nbytes_ = 0;
};

}  // namespace nexus
