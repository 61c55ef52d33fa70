// Reading single rows of a table in a file: the ones asked for, and none else.
//
//   rows ──sort, merge neighbours──▶ runs ──reader──▶ slots ──copy──▶ out, in the order asked for
//
// Owns a reader and its slots. Answers one caller at a time. What the reader does not deliver in
// one piece (short, refused, interrupted) is read once more, plainly, through the page cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "io/file.h"
#include "io/reader.h"
#include "io/staging.h"

namespace nexus {

// `num_rows` rows of `row_bytes` each, one after another from `offset` on.
struct Table {
  int64_t offset;
  int64_t row_bytes;
  int64_t num_rows;
};

struct RowCounts {
  int64_t rows = 0;    // asked for
  int64_t reads = 0;   // runs read
  int64_t bytes = 0;   // of the runs' windows
  int64_t second = 0;  // runs that needed the plain way
};

class RowReader {
 public:
  explicit RowReader(std::unique_ptr<Reader> reader) : reader_(std::move(reader)) {}

  // Copies row rows[i] to out + i * row_bytes. Blocks. Throws EngineError for a row that the table
  // does not have, ReadError and TruncatedCheckpoint for bytes that cannot be had,
  // CheckpointChanged.
  void read(File& file, const Table& table, std::span<const int64_t> rows, std::byte* out);
  RowCounts counts() const;

 private:
  // A wanted row and where it goes.
  struct Wanted {
    int64_t row;
    size_t place;
  };
  // Neighbouring wanted rows, and the window of the file that holds them.
  struct Run {
    std::span<const Wanted> wanted;
    int64_t window_offset;
    int64_t window_nbytes;
    int64_t needed_nbytes;  // of the window, from its start
  };

  std::vector<Run> runs_of(const File& file, const Table& table, std::span<const Wanted> wanted);
  void serve(File& file, const Table& table, const std::vector<Run>& runs, std::byte* out);
  void reserve_slots(const File& file, int64_t row_bytes);
  void complete(const Request& request, const File& file, const Run& run);

  std::unique_ptr<Reader> reader_;
  std::unique_ptr<Staging> staging_;
  int64_t slot_bytes_ = 0;
  mutable std::mutex mutex_;
  RowCounts counts_;
};

}  // namespace nexus
