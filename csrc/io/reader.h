// Readers: who turns a request into bytes. All of them behind one interface, so that the engine,
// the tests and the fault hook see no difference between a ring and a pool of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "io/file.h"

namespace nexus {

// One read in flight. The owner keeps it, and its buffer, alive until `wait` gives it back.
struct Request {
  File* file = nullptr;
  int64_t offset = 0;
  int64_t nbytes = 0;
  std::byte* buffer = nullptr;
  // Bytes read, 0 at the end of the file, or -errno. Set by the reader.
  int64_t result = 0;
};

class Reader {
 public:
  virtual ~Reader() = default;
  // Most requests in flight at once.
  virtual int depth() const = 0;
  // Starts a request; never waits for the disk.
  virtual void submit(Request* request) = 0;
  // Blocks until a request completes. Call only while one is in flight.
  virtual Request* wait() = 0;
  // For the report: "io_uring", "io_uring+fixed", "threads", ...
  virtual std::string name() const = 0;
};

// How many bytes of memory may be registered with the kernel for one reader, and where they are.
using Buffers = std::vector<std::span<std::byte>>;

struct UringOptions {
  // Without any completion for so long, what the kernel has not begun is taken back.
  int64_t patience_ms = 5000;
  // Of every read's entry; tests have them go through the kernel's workers.
  unsigned sqe_flags = 0;
};

// Null, with the reason in `refusal`, where the kernel, a container or the build denies io_uring.
std::unique_ptr<Reader> make_uring_reader(int depth, const Buffers& buffers, std::string& refusal,
                                          const UringOptions& options = {});
// Worker threads over pread. `dontcache` asks for uncached buffered reads where the kernel can.
std::unique_ptr<Reader> make_threads_reader(int depth, bool trailing_drop);
// Worker threads over the files' mappings; see reader_mmap.cpp.
std::unique_ptr<Reader> make_mmap_reader(int depth, bool trailing_drop);

}  // namespace nexus
