#include "io/file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <linux/stat.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "common/align.h"
#include "common/error.h"

namespace nexus {
namespace {

// Large enough for every file system seen; used where the kernel does not tell.
constexpr int64_t kDefaultAlignment = 4096;
constexpr int64_t kPageBytes = 4096;
// Readahead makes folios up to this size. Without it half of a file stayed in the cache (6.18).
constexpr int64_t kLargestFolio = 2 << 20;

Stamp stamp_of(const struct stat& info) {
  return {static_cast<int64_t>(info.st_dev), static_cast<int64_t>(info.st_ino), info.st_size,
          info.st_mtim.tv_sec * 1'000'000'000 + info.st_mtim.tv_nsec};
}

const char* what_differs(const Stamp& was, const Stamp& is) {
  if (was.device != is.device || was.inode != is.inode) return "another file stands at its path";
  if (was.size != is.size) return "its size is another";
  return "it was written to";
}

[[noreturn]] void fail_changed(const std::string& path, const Stamp& was, const Stamp& is) {
  fail("CheckpointChanged", "A checkpoint must not change while it is in use; ", path,
       " changed: ", what_differs(was, is), " (", was.size, " bytes then, ", is.size,
       " bytes now). Close the model and stream it again.");
}

bool is_memory_file_system(int descriptor) {
  struct statfs info;
  if (fstatfs(descriptor, &info) != 0) return false;
  return info.f_type == TMPFS_MAGIC || info.f_type == RAMFS_MAGIC;
}

// The kernel's own word since 6.1; {0, 0} means "no direct I/O on this file".
Alignment ask_alignment(int descriptor) {
  struct statx info = {};
  if (statx(descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) != 0 ||
      (info.stx_mask & STATX_DIOALIGN) == 0) {
    return {kDefaultAlignment, kDefaultAlignment};
  }
  return {static_cast<int64_t>(info.stx_dio_mem_align),
          static_cast<int64_t>(info.stx_dio_offset_align)};
}

// Some file systems accept the flag at open and refuse the read, so only a read proves it.
int try_direct_read(int descriptor) {
  std::unique_ptr<void, decltype(&std::free)> buffer(
      std::aligned_alloc(kDefaultAlignment, kDefaultAlignment), &std::free);
  if (buffer == nullptr) return ENOMEM;
  return pread(descriptor, buffer.get(), kDefaultAlignment, 0) < 0 ? errno : 0;
}

}  // namespace

File::File(std::string path, const Stamp& expected)
    : path_(std::move(path)), stamp_(expected), opened_at_(path_), arrived_(true) {
  open_checked(opened_at_);
}

// By way of the descriptor, for the file may get another name at any moment.
File::File(std::string path, const Stamp& expected, int descriptor, bool is_whole)
    : path_(std::move(path)),
      stamp_(expected),
      is_followed_(true),
      opened_at_(concat("/proc/self/fd/", descriptor)),
      arrived_(false) {
  if (is_whole) settle(expected.mtime_ns);
  open_checked(opened_at_);
  opened_at_ = concat("/proc/self/fd/", buffered_);
}

void File::open_checked(const std::string& where) {
  buffered_ = open(where.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  if (buffered_ < 0) {
    fail("ReadError", "A checkpoint file must be readable; cannot open ", path_, ": ",
         std::strerror(errno), ".");
  }
  struct stat info;
  if (fstat(buffered_, &info) != 0 || !is_same(stamp_of(info))) {
    close(buffered_);
    fail_changed(path_, stamp_, stamp_of(info));
  }
}

void File::settle(int64_t mtime_ns) {
  settled_mtime_ns_ = mtime_ns;
  arrived_.complete();
}

bool File::is_same(Stamp now) const {
  Stamp expected = stamp_;
  if (is_followed_) {
    const int64_t settled = settled_mtime_ns_;
    expected.mtime_ns = settled == kAny ? now.mtime_ns : settled;
  }
  return now == expected;
}

File::~File() {
  if (direct_ >= 0) close(direct_);
  close(buffered_);
}

bool File::enable_direct() {
  if (is_memory_file_system(buffered_)) {
    refusal_ = "the file lives in memory (tmpfs), where direct I/O has no meaning";
    return false;
  }
  const Alignment alignment = ask_alignment(buffered_);
  if (alignment.offset == 0) {
    refusal_ = "the file system reports no direct I/O for this file";
    return false;
  }
  direct_ = open(opened_at_.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_DIRECT);
  const int error = direct_ < 0 ? errno : try_direct_read(direct_);
  if (error != 0) {
    refuse_direct(std::strerror(error));
    return false;
  }
  alignment_ = alignment;
  is_direct_ = true;
  check_unchanged();  // the path was opened a second time
  return true;
}

void File::refuse_direct(const std::string& reason) {
  refusal_ = reason;
  is_direct_ = false;
}

void File::enable_mapping() {
  // Writable and private: torch may look at the pages as a tensor, the file never sees a store.
  void* address = mmap(nullptr, static_cast<size_t>(stamp_.size), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_NORESERVE, buffered_, 0);
  if (address == MAP_FAILED) {
    fail("ReadError", "io=\"mmap\" needs the file mapped; mmap of ", path_, " (", stamp_.size,
         " bytes) failed: ", std::strerror(errno), ". Use io=\"buffered\" or io=\"direct\".");
  }
  mapping_ = {static_cast<std::byte*>(address),
              [size = static_cast<size_t>(stamp_.size)](std::byte* begin) { munmap(begin, size); }};
}

void File::check_unchanged() const {
  struct stat open_file;
  struct stat at_path;
  if (fstat(buffered_, &open_file) != 0 || stat(opened_at_.c_str(), &at_path) != 0) {
    fail("CheckpointChanged", "A checkpoint must not change while it is in use; ", path_,
         " cannot be looked at any more: ", std::strerror(errno),
         ". Close the model and stream it again.");
  }
  for (const Stamp& now : {stamp_of(open_file), stamp_of(at_path)}) {
    if (!is_same(now)) fail_changed(path_, stamp_, now);
  }
}

void File::drop(int64_t offset, int64_t nbytes) const {
  const int64_t begin = align_down(offset, kPageBytes);
  const int64_t end = align_up(offset + nbytes, kPageBytes);
  // Both are needed: a mapped page survives fadvise, an unmapped one survives madvise.
  if (mapping_ != nullptr) {
    const int64_t last = std::min(end, align_up(size(), kPageBytes));
    madvise(mapping() + begin, static_cast<size_t>(last - begin), MADV_DONTNEED);
  }
  // The cache drops a folio whole or not at all: one that began before this range goes with it.
  const int64_t behind = std::max<int64_t>(0, begin - kLargestFolio);
  posix_fadvise(buffered_, behind, end - behind, POSIX_FADV_DONTNEED);
}

}  // namespace nexus
