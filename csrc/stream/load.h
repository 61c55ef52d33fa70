// A load: one group on its way into one arena, piece by piece, in any order of completion.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/xxh3.h"
#include "io/window.h"
#include "stream/pinned.h"

namespace nexus {

// What moves together. Pieces are cut once, when the group is given its arena.
struct Group {
  int arena = -1;  // of a pooled one, where it was placed last, or may be placed
  int64_t nbytes = 0;
  // Shares its arena with others; else it is resident.
  bool is_streamed = false;
  // Streamed, and in whichever arena the caller says.
  bool is_pooled = false;
  // Used beside the group in use and given back at once: ends nobody's use.
  bool is_brief = false;
  std::vector<Extent> extents;
  std::vector<Piece> pieces;
  std::vector<int> files;
  std::optional<uint64_t> digest;
  bool is_verified = false;
  // Stays in page-locked memory once it was read; made before the first read.
  bool stays_in_ram = false;
  std::unique_ptr<RamCopy> ram;
  int num_reading = 0;  // reads in flight, also of loads that were given up

  bool is_in_ram() const { return ram != nullptr && ram->is_filled; }
  // Where a copy in RAM should begin in a page, so that the longest extent is read in place.
  int64_t ram_phase() const;
};

// Progress of a load. Hashing follows the contiguous prefix that has landed, while it is in cache.
class Load {
 public:
  Load(const Group& group, bool hashed)
      : group_(&group), landed_at_(group.pieces.size()), hashed_(hashed) {}

  bool has_next() const { return next_ < group_->pieces.size(); }
  size_t next() const { return next_; }
  size_t take_next() { return next_++; }
  bool is_complete() const { return num_landed_ == group_->pieces.size(); }

  // The piece is where it belongs, or on its way there. Its bytes can be read at `bytes` until
  // `is_through_with` it.
  void landed(size_t piece, const std::byte* bytes) {
    landed_at_[piece] = bytes;
    ++num_landed_;
    if (!hashed_) return;
    for (; hash_next_ < landed_at_.size() && landed_at_[hash_next_] != nullptr; ++hash_next_) {
      hash_.update(landed_at_[hash_next_], static_cast<size_t>(group_->pieces[hash_next_].nbytes));
    }
  }

  // The piece is where it belongs, and no processor can read it there.
  void landed_unseen(size_t piece) {
    landed_at_[piece] = nullptr;
    ++num_landed_;
    is_unseen_ = true;
  }

  bool is_through_with(size_t piece) const { return !hashed_ || is_unseen_ || piece < hash_next_; }
  bool is_hashed() const { return hashed_; }
  // Part of it landed unseen: `digest` knows nothing.
  bool is_unseen() const { return is_unseen_; }
  uint64_t digest() const { return hash_.digest(); }

 private:
  const Group* group_;
  size_t next_ = 0;
  size_t num_landed_ = 0;
  size_t hash_next_ = 0;
  std::vector<const std::byte*> landed_at_;
  bool hashed_;
  bool is_unseen_ = false;
  Xxh3 hash_;
};

}  // namespace nexus
