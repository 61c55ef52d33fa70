// One checkpoint file: a buffered and, where the file system allows it, an O_DIRECT descriptor,
// and, on request, a read-only mapping. Owns them; closes them with itself.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "io/arrived.h"

namespace nexus {

// What a file was when its header was validated. A difference later is an error, never new data.
struct Stamp {
  int64_t device;
  int64_t inode;
  int64_t size;
  int64_t mtime_ns;
  bool operator==(const Stamp&) const = default;
};

// What O_DIRECT asks of a request: of the buffer's address, and of file offset and length.
struct Alignment {
  int64_t memory = 1;
  int64_t offset = 1;
};

class File {
 public:
  static constexpr int64_t kAny = -1;

  // Opens without ever blocking on a FIFO or a device. Throws CheckpointChanged when the file is
  // not the one `expected` describes.
  File(std::string path, const Stamp& expected);
  // The file behind `descriptor`, which stays the caller's. What stands at `path` does not count:
  // the bytes behind the descriptor are those that were checked. Where `is_whole` is false it still
  // arrives, and its time of change counts from `settle` on.
  File(std::string path, const Stamp& expected, int descriptor, bool is_whole);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Tries O_DIRECT by really reading. False, with the reason in `refusal()`, where it is refused.
  bool enable_direct();
  // A later refusal (EINVAL at a read) is remembered: it is asked for once, not once a request.
  void refuse_direct(const std::string& reason);
  // Maps the whole file, read-only for everybody: the mapping is private and never written.
  void enable_mapping();

  // Throws CheckpointChanged, also when the path now names another file.
  void check_unchanged() const;
  // It has arrived, and was last written to then.
  void settle(int64_t mtime_ns);
  // What of it may be read.
  Arrived& arrived() { return arrived_; }
  const Arrived& arrived() const { return arrived_; }
  // Gives the pages of a range back: unmaps them here, then drops them from the page cache.
  void drop(int64_t offset, int64_t nbytes) const;

  const std::string& path() const { return path_; }
  int64_t size() const { return stamp_.size; }
  bool is_direct() const { return is_direct_.load(std::memory_order_relaxed); }
  const std::string& refusal() const { return refusal_; }
  // The descriptor reads go through now.
  int descriptor() const { return is_direct() ? direct_ : buffered_; }
  int buffered_descriptor() const { return buffered_; }
  const Alignment& alignment() const { return alignment_; }
  std::byte* mapping() const { return mapping_.get(); }
  // Shares the ownership of the pages: they stay mapped for whoever looks at them as a tensor.
  std::shared_ptr<std::byte> shared_mapping() const { return mapping_; }

 private:
  void open_checked(const std::string& where);
  bool is_same(Stamp now) const;

  std::string path_;
  Stamp stamp_;
  const bool is_followed_ = false;                // behind a descriptor, not a path
  std::string opened_at_;                         // where it can be opened once more
  std::atomic<int64_t> settled_mtime_ns_ = kAny;  // of one that is followed
  Arrived arrived_;
  int buffered_ = -1;
  int direct_ = -1;
  std::atomic<bool> is_direct_ = false;
  Alignment alignment_;
  std::string refusal_;
  std::shared_ptr<std::byte> mapping_;
};

}  // namespace nexus
