// What profilers see of this library: ranges of work in NVTX's domain "nexus", each with the bytes
// it is about. Without a tool attached a range is a load and a branch; in a build without NVTX's
// headers it is nothing (range_absent.cpp).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace nexus {

// Every name that a range may have. A new one is a new line here; docs/usage.md explains them.
inline constexpr std::array<const char*, 4> kRangeNames = {
    "copy",
    "dequantize",
    "read",
    "wait",
};

// One of kRangeNames. A literal becomes one while compiling, and a name that is not in the table
// does not compile.
class RangeName {
 public:
  consteval RangeName(const char* name) : index_(find(name)) {}  // NOLINT: "read" is a name
  constexpr size_t index() const { return index_; }

 private:
  static consteval size_t find(std::string_view name) {
    for (size_t i = 0; i < kRangeNames.size(); ++i) {
      if (name == kRangeNames[i]) return i;
    }
    throw "kRangeNames lacks this name";
  }

  size_t index_;
};

// Work of this thread, while the object lives: `const Range range("read", nbytes);`. Ranges of one
// thread nest.
class Range {
 public:
  Range(RangeName name, int64_t nbytes);
  ~Range();
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  bool is_open_;
};

// Work that begins in one function, or thread, and ends in another; such ranges may overlap. Keep
// it with the request: it ends when it is told to, is assigned to, or is destroyed. One thread at a
// time.
class AsyncRange {
 public:
  AsyncRange() = default;
  AsyncRange(RangeName name, int64_t nbytes);
  ~AsyncRange() { end(); }
  AsyncRange(AsyncRange&& other) noexcept : id_(other.id_) { other.id_ = 0; }
  AsyncRange& operator=(AsyncRange&& other) noexcept {
    if (this != &other) {
      end();
      id_ = other.id_;
      other.id_ = 0;
    }
    return *this;
  }

  void end() {
    if (id_ != 0) close();
  }

 private:
  void close();

  uint64_t id_ = 0;  // 0: no range
};

// Whether this build can talk to a profiler.
bool has_nvtx();

}  // namespace nexus
