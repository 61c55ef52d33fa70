// Ranges of a file that may be read yet. Of a file that is there that is all of it; of one that
// still arrives, what somebody has announced: elsewhere it has holes, which read as zeros.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>

namespace nexus {

// Any thread may call.
class Arrived {
 public:
  explicit Arrived(bool is_whole) : is_whole_(is_whole) {}

  // [offset, offset + nbytes) stands in the file, and changes no more.
  void add(int64_t offset, int64_t nbytes);
  // All of it does.
  void complete() { is_whole_ = true; }

  bool is_whole() const { return is_whole_; }
  // Whether every byte may be read. None always may.
  bool covers(int64_t offset, int64_t nbytes) const;

 private:
  std::atomic<bool> is_whole_;
  mutable std::mutex mutex_;
  std::map<int64_t, int64_t> ends_;  // by beginning; they neither overlap nor touch
};

}  // namespace nexus
