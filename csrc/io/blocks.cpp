#include "io/blocks.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <vector>

#include "common/align.h"
#include "common/xxh3.h"
#include "io/staging.h"
#include "io/window.h"

namespace nexus {
namespace {

// Below this every reader's own depth is more than is needed.
constexpr int64_t kFewReads = 8;
constexpr int64_t kHugePageBytes = 2 << 20;

// A wish. On a virtual disk reads into small pages had half the rate: a request holds so many pages
// and no more.
void want_huge_pages(std::byte* at, int64_t nbytes) {
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(at));
  const int64_t begin = align_up(address, kHugePageBytes);
  const int64_t end = align_down(address + nbytes, kHugePageBytes);
  if (begin >= end) return;
  madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
}

// Answers after which the bytes may still be had another way.
bool is_soft(int64_t result, bool was_direct) {
  if (result >= 0 || result == -EINTR || result == -EAGAIN) return true;
  return was_direct && (result == -EINVAL || result == -EOPNOTSUPP);
}

// Bytes [begin, nbytes) of a buffer that stands for the file from `offset` on. 0, errno, or
// ENODATA.
int64_t read_plainly(const File& file, int64_t offset, std::byte* buffer, int64_t begin,
                     int64_t nbytes) {
  while (begin < nbytes) {
    const ssize_t count = pread(file.buffered_descriptor(), buffer + begin,
                                static_cast<size_t>(nbytes - begin), offset + begin);
    if (count < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (count <= 0) return count == 0 ? ENODATA : errno;
    begin += count;
  }
  file.drop(offset, nbytes);
  return 0;
}

class BlockRead {
 public:
  BlockRead(File& file, const BlockTable& table, std::byte* out, Reader& reader)
      : file_(file), table_(table), out_(out), reader_(reader) {
    cut({0, table.offset, table.nbytes, 0}, out, file.alignment(), table.block_bytes, pieces_);
    for (int64_t at = 0; at < table.nbytes; at += table.block_bytes) {
      missing_.push_back(std::min(table.block_bytes, table.nbytes - at));
    }
    slots_.resize(std::min(pieces_.size(), static_cast<size_t>(reader.depth())));
    const auto is_staged = [](const Piece& piece) { return piece.staged; };
    if (std::any_of(pieces_.begin(), pieces_.end(), is_staged)) {
      staging_ = std::make_unique<Staging>(static_cast<int>(slots_.size()),
                                           slot_bytes(file.alignment(), table.block_bytes));
    }
  }

  // Keeps the reader full until everything was asked for, or a block is bad; then waits for what is
  // in flight, because nobody may write into `out` after that.
  BlockVerdict run() {
    for (size_t slot = 0; slot < slots_.size(); ++slot) start(slot);
    for (size_t in_flight = slots_.size(); in_flight > 0; --in_flight) {
      const size_t slot = slot_of(reader_.wait());
      const Slot done = slots_[slot];
      if (is_bad()) continue;
      if (!done.piece->staged && next_ < pieces_.size() && is_soft(done.request.result, true)) {
        // The disk gets its next request before this answer is hashed.
        start(slot);
        ++in_flight;
        complete(done);
      } else {
        complete(done);
        if (is_bad() || next_ == pieces_.size()) continue;
        start(slot);
        ++in_flight;
      }
    }
    return verdict_;
  }

 private:
  struct Slot {
    Request request;
    const Piece* piece = nullptr;
    bool was_direct = false;
  };

  bool is_bad() const { return verdict_.bad_block >= 0; }

  size_t slot_of(const Request* request) const {
    const auto found = std::find_if(slots_.begin(), slots_.end(),
                                    [request](const Slot& s) { return &s.request == request; });
    return static_cast<size_t>(found - slots_.begin());
  }

  void start(size_t index) {
    Slot& slot = slots_[index];
    slot.piece = &pieces_[next_++];
    slot.was_direct = file_.is_direct();
    std::byte* buffer = slot.piece->staged ? staging_->slot(static_cast<int>(index))
                                           : out_ + slot.piece->group_offset;
    slot.request = {&file_, slot.piece->window_offset, slot.piece->window_nbytes, buffer, 0};
    reader_.submit(&slot.request);
  }

  void complete(const Slot& slot) {
    const Piece& piece = *slot.piece;
    const int64_t needed = piece.offset + piece.nbytes - piece.window_offset;
    const int64_t result = slot.request.result;
    if (!is_soft(result, slot.was_direct)) return refuse(piece.group_offset, -result);
    if (result < needed) {
      ++verdict_.num_plain;
      if ((result == -EINVAL || result == -EOPNOTSUPP) && file_.is_direct()) {
        file_.refuse_direct(std::strerror(static_cast<int>(-result)));
      }
      const int64_t error = read_plainly(file_, piece.window_offset, slot.request.buffer,
                                         std::max<int64_t>(result, 0), needed);
      if (error != 0) return refuse(piece.group_offset, error);
    }
    if (piece.staged) {
      verdict_.bytes_staged += piece.nbytes;
      std::memcpy(out_ + piece.group_offset,
                  slot.request.buffer + (piece.offset - piece.window_offset),
                  static_cast<size_t>(piece.nbytes));
    }
    landed(piece.group_offset, piece.nbytes);
  }

  void landed(int64_t offset, int64_t nbytes) {
    const int64_t end = offset + nbytes;
    while (offset < end) {
      const int64_t block = offset / table_.block_bytes;
      const int64_t next = std::min(end, (block + 1) * table_.block_bytes);
      int64_t& missing = missing_[static_cast<size_t>(block)];
      missing -= next - offset;
      if (missing == 0) check(block);
      offset = next;
    }
  }

  void check(int64_t block) {
    if (is_right(block)) return;
    ++verdict_.num_second;
    const int64_t begin = block * table_.block_bytes;
    const int64_t nbytes = block_nbytes(block);
    // What the page cache holds is not what the disk does.
    file_.drop(table_.offset + begin, nbytes);
    const int64_t error = read_plainly(file_, table_.offset + begin, out_ + begin, 0, nbytes);
    if (error != 0 || !is_right(block)) refuse(begin, error);
  }

  bool is_right(int64_t block) const {
    const uint64_t digest =
        xxh3_64(out_ + block * table_.block_bytes, static_cast<size_t>(block_nbytes(block)));
    return static_cast<int64_t>(digest) == table_.digests[static_cast<size_t>(block)];
  }

  int64_t block_nbytes(int64_t block) const {
    return std::min(table_.block_bytes, table_.nbytes - block * table_.block_bytes);
  }

  void refuse(int64_t offset, int64_t error) {
    const int64_t block = offset / table_.block_bytes;
    if (is_bad() && block >= verdict_.bad_block) return;
    verdict_.bad_block = block;
    verdict_.error = error;
  }

  File& file_;
  const BlockTable& table_;
  std::byte* out_;
  Reader& reader_;
  std::vector<Piece> pieces_;
  std::vector<int64_t> missing_;  // bytes of each block that have not landed
  std::vector<Slot> slots_;
  std::unique_ptr<Staging> staging_;
  size_t next_ = 0;
  BlockVerdict verdict_;
};

}  // namespace

BlockVerdict read_blocks(const std::string& path, const Stamp& stamp, const BlockTable& table,
                         std::byte* out, const ReadMode& mode, const FaultPlan* faults) {
  std::vector<std::unique_ptr<File>> files;
  files.push_back(std::make_unique<File>(path, stamp));
  Rung rung = prepare_files(files, mode);
  want_huge_pages(out, table.nbytes);
  ReadMode sized = mode;
  // No more threads than reads: each block is one, and a head and a tail may be more.
  const auto num_reads = static_cast<int64_t>(table.digests.size()) + 2;
  if (mode.depth == 0 && num_reads < kFewReads) sized.depth = static_cast<int>(num_reads);
  // The memory is used once: registering it would cost what it saves.
  make_reader(rung, sized, {});
  const bool is_ring = rung.reader->name().starts_with("io_uring");
  FaultCounts counts;
  if (faults != nullptr) {
    rung.reader = make_faulty_reader(std::move(rung.reader), *faults, &counts);
  }
  BlockVerdict verdict = BlockRead(*files[0], table, out, *rung.reader).run();
  verdict.is_direct = files[0]->is_direct();
  verdict.is_ring = is_ring;
  verdict.num_faults = counts.errors + counts.retries + counts.shorts + counts.delays +
                       counts.flips + counts.refusals;
  if (verdict.bad_block < 0) files[0]->check_unchanged();
  return verdict;
}

}  // namespace nexus
