// What the engine does beside its arenas: digests, rows, mapped pages, and what it tells of itself.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>

#include "common/bounds.h"
#include "common/clock.h"
#include "common/error.h"
#include "common/json.h"
#include "io/page_cache.h"
#include "stream/engine.h"

namespace nexus {
namespace {

// Rows are small and far apart: a disk serves this many seeks at once nearly as fast as one.
constexpr int kRowDepth = 8;

}  // namespace

uint64_t Engine::digest_of(int group) const {
  {
    const std::unique_lock lock = enter();
    check_group(group);
  }
  Xxh3 hash;
  std::vector<std::byte> buffer(static_cast<size_t>(options_.mode.chunk_bytes));
  for (const Piece& piece : group_at(group).pieces) {
    const File& file = *files_[static_cast<size_t>(piece.file)];
    if (!file.arrived().covers(piece.offset, piece.nbytes)) {
      fail("EngineError", "A digest is of bytes that are there, and ", file.path(),
           " still arrives. Wait until it is whole.");
    }
    for (int64_t done = 0; done < piece.nbytes;) {
      const ssize_t count = pread(file.buffered_descriptor(), buffer.data(),
                                  static_cast<size_t>(piece.nbytes - done), piece.offset + done);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) {
        fail(count < 0 ? "ReadError" : "TruncatedCheckpoint", "Cannot read ", file.path(),
             " at offset ", piece.offset + done,
             " for its digest: ", count < 0 ? std::strerror(errno) : "the file ends there", ".");
      }
      hash.update(buffer.data(), static_cast<size_t>(count));
      done += count;
    }
    file.drop(piece.offset, piece.nbytes);
  }
  return hash.digest();
}

void Engine::read_rows(int file, const Table& table, std::span<const int64_t> rows,
                       std::byte* out) {
  {
    std::unique_lock lock = enter();
    if (!is_index(file, files_.size()) || table.row_bytes <= 0 || table.num_rows < 0 ||
        table.num_rows > std::numeric_limits<int64_t>::max() / table.row_bytes ||
        !is_range(table.offset, table.num_rows * table.row_bytes,
                  files_[static_cast<size_t>(file)]->size())) {
      fail("EngineError", "A table lies inside a file; got ", table.num_rows, " rows of ",
           table.row_bytes, " bytes at offset ", table.offset, " of file ", file, " of ",
           files_.size(), ".");
    }
    if (rows_ == nullptr) {
      auto reader = make_threads_reader(kRowDepth, options_.mode.trailing_drop);
      if (options_.has_faults) {
        reader = make_faulty_reader(std::move(reader), options_.faults, &fault_counts_);
      }
      rows_ = std::make_unique<RowReader>(std::move(reader));
    }
    await_rows(lock, *files_[static_cast<size_t>(file)], table, rows);
  }
  rows_->read(*files_[static_cast<size_t>(file)], table, rows, out);
}

// Rows that the table does not have are not waited for: who reads them says so.
void Engine::await_rows(std::unique_lock<std::mutex>& lock, const File& file, const Table& table,
                        std::span<const int64_t> rows) {
  for (const int64_t row : rows) {
    if (row < 0 || row >= table.num_rows) continue;
    while (!file.arrived().covers(table.offset + row * table.row_bytes, table.row_bytes)) {
      if (!no_more_.empty()) throw std::runtime_error(no_more_);
      if (wait_for_news(lock)) fail("Interrupted", "interrupted while waiting for row ", row);
      check_usable();
    }
  }
}

void Engine::announce(const std::vector<Span>& spans) {
  const std::unique_lock lock = enter();
  for (const Span& span : spans) {
    if (!is_index(span.file, files_.size()) ||
        !is_range(span.offset, span.nbytes, files_[static_cast<size_t>(span.file)]->size())) {
      fail("EngineError", "What arrived lies in a file; got ", span.nbytes, " bytes at offset ",
           span.offset, " of file ", span.file, " of ", files_.size(), ".");
    }
    files_[static_cast<size_t>(span.file)]->arrived().add(span.offset, span.nbytes);
  }
  work_.notify_all();
  landed_.notify_all();
}

void Engine::settle(int file, int64_t mtime_ns) {
  const std::unique_lock lock = enter();
  if (!is_index(file, files_.size()) || mtime_ns < 0) {
    fail("EngineError", "A file that arrived is one of ", files_.size(), ", got ", file, ".");
  }
  files_[static_cast<size_t>(file)]->settle(mtime_ns);
  work_.notify_all();
  landed_.notify_all();
}

void Engine::end_arrival(const std::string& why) {
  const std::unique_lock lock = enter();
  if (no_more_.empty()) no_more_ = why;
  work_.notify_all();
  landed_.notify_all();
}

void Engine::refuse(const std::string& why) {
  const std::unique_lock lock = enter();
  lose(why);
}

void Engine::prefault(bool background) {
  enter().unlock();
  if (prefault_thread_.joinable()) prefault_thread_.join();
  prefault_thread_ = std::thread([this] {
    const Clock::time_point began = Clock::now();
    const int num_threads = std::max(2u, std::thread::hardware_concurrency());
    for (const auto& file : files_) {
      if (file->mapping() == nullptr) continue;
      prefault_bytes_ +=
          populate_parallel(file->mapping(), file->size(), num_threads, &cancel_prefault_);
    }
    prefault_ns_ = since_ns(began);
  });
  if (!background) prefault_thread_.join();
}

std::shared_ptr<std::byte> Engine::map(int file, int64_t offset, int64_t nbytes) const {
  if (!is_index(file, files_.size()) || files_[static_cast<size_t>(file)]->mapping() == nullptr) {
    fail("EngineError", "Only files opened with io=\"mmap\" are mapped; got file ", file, " of ",
         files_.size(), ".");
  }
  const File& mapped = *files_[static_cast<size_t>(file)];
  if (!is_range(offset, nbytes, mapped.size())) {
    fail("EngineError", "A view lies inside its file; got ", nbytes, " bytes at offset ", offset,
         " of ", mapped.path(), " with ", mapped.size(), " bytes.");
  }
  return {mapped.shared_mapping(), mapped.mapping() + offset};
}

std::string Engine::stats() const {
  const std::unique_lock lock = enter();
  const Counters& c = counters_;
  // A file may have been refused direct reads after the start.
  std::string refusal = rung_.refusal;
  bool is_direct = rung_.io == "direct";
  for (const auto& file : files_) {
    if (is_direct && !file->is_direct()) {
      is_direct = false;
      refusal = concat("O_DIRECT is refused for ", file->path(), ": ", file->refusal());
    }
  }
  const RowCounts rows = rows_ == nullptr ? RowCounts() : rows_->counts();
  JsonObject out;
  out.add("io_mode", rung_.io == "direct" && !is_direct ? "buffered" : rung_.io)
      .add("reader", rung_.reader == nullptr ? std::string() : rung_.reader->name())
      .add("refusal", refusal)
      .add("depth", static_cast<int64_t>(rung_.reader == nullptr ? 0 : rung_.reader->depth()))
      .add("chunk_bytes", options_.mode.chunk_bytes)
      .add("staging_bytes", staging_ == nullptr ? int64_t{0} : staging_->nbytes())
      .add("num_slots", static_cast<int64_t>(staging_ == nullptr ? 0 : staging_->num_slots()))
      .add("device", device_->name())
      .add("is_pinned", staging_lock_ != nullptr && !device_->is_host())
      .add("pin_refusal", pin_refusal_)
      .add("ram_bytes", ram_bytes_)
      .add("num_views", static_cast<int64_t>(std::count_if(arenas_.begin(), arenas_.end(),
                                                           [](auto& a) { return a.is_view; })))
      .add("bytes_read", c.bytes_read)
      .add("bytes_direct", c.bytes_direct)
      .add("bytes_staged", c.bytes_staged)
      .add("num_reads", c.num_reads)
      .add("num_short_reads", c.num_short_reads)
      .add("num_retries", c.num_retries)
      .add("num_in_flight", static_cast<int64_t>(num_in_flight_))
      .add("num_stale_reads", c.num_stale_reads)
      .add("num_loads", c.num_loads)
      .add("num_landed", c.num_landed)
      .add("num_failed", c.num_failed)
      .add("num_hits", c.num_hits)
      .add("num_resident_hits", c.num_resident_hits)
      .add("num_waits", c.num_waits)
      .add("num_mispredicted", c.num_mispredicted)
      .add("num_verified", c.num_verified)
      .add("num_healed", c.num_healed)
      .add("num_dropped", c.num_dropped)
      .add("num_cloned", c.num_cloned)
      .add("num_copies", c.num_copies)
      .add("bytes_copied", c.bytes_copied)
      .add("num_ram_loads", c.num_ram_loads)
      .add("num_blocks", c.num_blocks)
      .add("num_rows", rows.rows)
      .add("num_row_reads", rows.reads)
      .add("num_row_retries", rows.second)
      .add("row_bytes_read", rows.bytes)
      .add("stall_seconds", static_cast<double>(c.stall_ns) * 1e-9)
      .add("busy_seconds", static_cast<double>(c.busy_ns) * 1e-9)
      .add("prefault_bytes", prefault_bytes_.load())
      .add("prefault_seconds", static_cast<double>(prefault_ns_.load()) * 1e-9)
      .add("num_injected_errors", fault_counts_.errors.load())
      .add("num_injected_retries", fault_counts_.retries.load())
      .add("num_injected_shorts", fault_counts_.shorts.load())
      .add("num_injected_delays", fault_counts_.delays.load())
      .add("num_injected_flips", fault_counts_.flips.load())
      .add("num_injected_refusals", fault_counts_.refusals.load());
  return out.str();
}

}  // namespace nexus
