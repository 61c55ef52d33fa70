#include "io/rows.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "common/align.h"
#include "common/error.h"

namespace nexus {
namespace {

// Neighbouring rows are read together up to here; a longer read would delay the others.
constexpr int64_t kRunBytes = 64 << 10;

// Everything from `begin` on that is still missing of the first `nbytes` of the window.
void read_plainly(const File& file, int64_t offset, std::byte* buffer, int64_t begin,
                  int64_t nbytes) {
  while (begin < nbytes) {
    const ssize_t count = pread(file.buffered_descriptor(), buffer + begin,
                                static_cast<size_t>(nbytes - begin), offset + begin);
    if (count < 0 && errno == EINTR) continue;
    if (count == 0) {
      fail("TruncatedCheckpoint", "A checkpoint must hold every byte its header promises; ",
           file.path(), " ends at offset ", offset + begin, ", rows up to byte ", offset + nbytes,
           " were expected. The file was cut or its download is incomplete; fetch it again.");
    }
    if (count < 0) {
      fail("ReadError", "A read must succeed; ", file.path(), " at offset ", offset + begin,
           " failed: ", std::strerror(errno),
           ". Check the disk; the same call may be tried again.");
    }
    begin += count;
  }
  file.drop(offset, nbytes);
}

}  // namespace

void RowReader::read(File& file, const Table& table, std::span<const int64_t> rows,
                     std::byte* out) {
  std::vector<Wanted> wanted;
  wanted.reserve(rows.size());
  for (size_t place = 0; place < rows.size(); ++place) {
    if (rows[place] < 0 || rows[place] >= table.num_rows) {
      fail("EngineError", "A row lies in [0, ", table.num_rows, "), got ", rows[place],
           ". Check the ids: the table has no such row.");
    }
    wanted.push_back({rows[place], place});
  }
  std::sort(wanted.begin(), wanted.end(),
            [](const Wanted& a, const Wanted& b) { return a.row < b.row; });
  const std::lock_guard lock(mutex_);
  counts_.rows += static_cast<int64_t>(rows.size());
  if (file.mapping() != nullptr) {
    for (const Wanted& want : wanted) {
      std::memcpy(out + static_cast<int64_t>(want.place) * table.row_bytes,
                  file.mapping() + table.offset + want.row * table.row_bytes,
                  static_cast<size_t>(table.row_bytes));
    }
  } else {
    reserve_slots(file, table.row_bytes);
    serve(file, table, runs_of(file, table, wanted), out);
  }
  file.check_unchanged();
}

RowCounts RowReader::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

std::vector<RowReader::Run> RowReader::runs_of(const File& file, const Table& table,
                                               std::span<const Wanted> wanted) {
  std::vector<Run> runs;
  const int64_t unit = file.alignment().offset;
  for (size_t begin = 0; begin < wanted.size();) {
    size_t end = begin + 1;
    const auto nbytes_to = [&](size_t last) {
      return (wanted[last].row + 1 - wanted[begin].row) * table.row_bytes;
    };
    while (end < wanted.size() && wanted[end].row <= wanted[end - 1].row + 1 &&
           nbytes_to(end) <= std::max(kRunBytes, table.row_bytes)) {
      ++end;
    }
    const int64_t offset = table.offset + wanted[begin].row * table.row_bytes;
    const int64_t window = align_down(offset, unit);
    const int64_t needed = offset + nbytes_to(end - 1) - window;
    runs.push_back({wanted.subspan(begin, end - begin), window, align_up(needed, unit), needed});
    begin = end;
  }
  return runs;
}

void RowReader::reserve_slots(const File& file, int64_t row_bytes) {
  const int64_t wanted = std::max(kRunBytes, row_bytes) + 2 * file.alignment().offset;
  if (wanted <= slot_bytes_) return;
  slot_bytes_ = wanted;
  staging_ = std::make_unique<Staging>(reader_->depth(), slot_bytes_);
}

// Keeps the reader full; copies rows out as their runs arrive.
void RowReader::serve(File& file, const Table& table, const std::vector<Run>& runs,
                      std::byte* out) {
  const auto depth = static_cast<size_t>(reader_->depth());
  std::vector<Request> requests(std::min(depth, runs.size()));
  std::vector<size_t> run_of(requests.size());
  size_t next = 0;
  auto start = [&](size_t slot) {
    run_of[slot] = next;
    const Run& run = runs[next++];
    requests[slot] = {&file, run.window_offset, run.window_nbytes,
                      staging_->slot(static_cast<int>(slot)), 0};
    reader_->submit(&requests[slot]);
  };
  for (size_t slot = 0; slot < requests.size(); ++slot) start(slot);
  // The first error is kept until every read is back: slots must not be written after that.
  std::string error;
  for (size_t in_flight = requests.size(); in_flight > 0; --in_flight) {
    const auto slot = static_cast<size_t>(reader_->wait() - requests.data());
    const Run& run = runs[run_of[slot]];
    try {
      if (error.empty()) complete(requests[slot], file, run);
    } catch (const Error& failed) {
      error = failed.what();
    }
    if (!error.empty()) continue;
    const std::byte* first = requests[slot].buffer +
                             (table.offset + run.wanted[0].row * table.row_bytes) -
                             run.window_offset;
    for (const Wanted& want : run.wanted) {
      std::memcpy(out + static_cast<int64_t>(want.place) * table.row_bytes,
                  first + (want.row - run.wanted[0].row) * table.row_bytes,
                  static_cast<size_t>(table.row_bytes));
    }
    if (next < runs.size()) {
      start(slot);
      ++in_flight;
    }
  }
  if (!error.empty()) throw std::runtime_error(error);
}

// Makes sure that the run's bytes are there.
void RowReader::complete(const Request& request, const File& file, const Run& run) {
  ++counts_.reads;
  counts_.bytes += std::max<int64_t>(request.result, 0);
  if (request.result >= run.needed_nbytes) return;
  ++counts_.second;
  read_plainly(file, run.window_offset, request.buffer, std::max<int64_t>(request.result, 0),
               run.needed_nbytes);
}

}  // namespace nexus
