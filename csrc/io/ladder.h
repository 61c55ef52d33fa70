// The ladder: from the reader that was asked for, down to one that works here. Probed by really
// reading, decided once, and reported: nobody gets buffered reads believing they are direct.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "io/file.h"
#include "io/reader.h"

namespace nexus {

// What the caller asks for.
struct ReadMode {
  std::string io = "direct";  // "direct" | "buffered" | "mmap" | "gds"
  bool allow_uring = true;    // false: pread threads also where io_uring works
  bool trailing_drop = true;  // leave no pages behind (buffered, mmap)
  int depth = 0;              // requests in flight; 0: the reader's default
  int64_t chunk_bytes = 1 << 20;
};

// No reader starts more requests than this unless it is told to.
constexpr int kLargestDefaultDepth = 16;

// What the caller gets.
struct Rung {
  std::unique_ptr<Reader> reader;
  std::string io;       // the effective mode
  std::string refusal;  // why a higher rung was refused; empty where none was
};

// Makes the files ready for the mode, stepping down file by file; returns the effective mode.
Rung prepare_files(const std::vector<std::unique_ptr<File>>& files, const ReadMode& mode);

// Fills in the reader; of "gds" that for host memory. `buffers` is memory worth registering with
// the kernel.
void make_reader(Rung& rung, const ReadMode& mode, const Buffers& buffers);

}  // namespace nexus
