// A load: one group on its way into one arena, piece by piece, in any order of completion.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/xxh3.h"
#include "io/window.h"

namespace nexus {

// What moves together. Pieces are cut once, when the group is given its arena.
struct Group {
  int arena = -1;
  int64_t nbytes = 0;
  // Shares its arena with others; else it is resident.
  bool is_streamed = false;
  // Used beside the group in use and given back at once: ends nobody's use.
  bool is_brief = false;
  std::vector<Piece> pieces;
  std::vector<int> files;
  std::optional<uint64_t> digest;
  bool is_verified = false;
};

// Progress of a load. Hashing follows the contiguous prefix that has landed, while it is in cache.
class Load {
 public:
  Load(const Group& group, bool hashed)
      : group_(&group), done_(group.pieces.size()), hashed_(hashed) {}

  bool has_next() const { return next_ < group_->pieces.size(); }
  size_t take_next() { return next_++; }
  bool is_complete() const { return num_done_ == group_->pieces.size(); }

  // The piece's bytes stand at their place in the group.
  void landed(size_t piece, const std::byte* base) {
    done_[piece] = true;
    ++num_done_;
    if (!hashed_) return;
    for (; hash_next_ < done_.size() && done_[hash_next_]; ++hash_next_) {
      const Piece& next = group_->pieces[hash_next_];
      hash_.update(base + next.group_offset, static_cast<size_t>(next.nbytes));
    }
  }

  bool is_hashed() const { return hashed_; }
  uint64_t digest() const { return hash_.digest(); }

 private:
  const Group* group_;
  size_t next_ = 0;
  size_t num_done_ = 0;
  size_t hash_next_ = 0;
  std::vector<bool> done_;
  bool hashed_;
  Xxh3 hash_;
};

}  // namespace nexus
