#include "io/measure.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "common/align.h"
#include "common/error.h"
#include "common/json.h"
#include "io/staging.h"

namespace nexus {
namespace {

Stamp stamp_now(const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0) {
    fail("ReadError", "A file to measure must exist; ", path, ": ", std::strerror(errno), ".");
  }
  if (!S_ISREG(info.st_mode) || info.st_size == 0) {
    fail("ReadError", "Only a regular file with content can be measured; ", path, " is none.");
  }
  return {static_cast<int64_t>(info.st_dev), static_cast<int64_t>(info.st_ino), info.st_size,
          info.st_mtim.tv_sec * 1'000'000'000 + info.st_mtim.tv_nsec};
}

// Keeps the reader full until `max_bytes` were asked for; returns the bytes that came.
int64_t sweep(Reader& reader, File& file, const Staging& staging, int64_t chunk_bytes,
              int64_t max_bytes) {
  std::vector<Request> requests(static_cast<size_t>(reader.depth()));
  const int64_t whole = std::max<int64_t>(1, file.size() / chunk_bytes) * chunk_bytes;
  int64_t asked = 0;
  int64_t read = 0;
  int in_flight = 0;
  auto start = [&](Request& request) {
    request.offset = asked % whole;
    reader.submit(&request);
    asked += chunk_bytes;
    ++in_flight;
  };
  for (size_t i = 0; i < requests.size() && asked < max_bytes; ++i) {
    requests[i] = {&file, 0, chunk_bytes, staging.slot(static_cast<int>(i)), 0};
    start(requests[i]);
  }
  int64_t error = 0;
  while (in_flight > 0) {
    Request* request = reader.wait();
    --in_flight;
    error = std::min(error, request->result);
    read += std::max<int64_t>(request->result, 0);
    if (asked < max_bytes && error == 0) start(*request);
  }
  if (error != 0) {
    fail("ReadError", "A read must succeed; ", file.path(),
         " failed while it was measured: ", std::strerror(static_cast<int>(-error)), ".");
  }
  return read;
}

}  // namespace

std::string measure_read(const std::string& path, const ReadMode& mode, int64_t max_bytes) {
  std::vector<std::unique_ptr<File>> files;
  files.push_back(std::make_unique<File>(path, stamp_now(path)));
  Rung rung = prepare_files(files, mode);
  const int num_slots = std::max(mode.depth, kLargestDefaultDepth);
  // Every read starts and ends where O_DIRECT accepts it.
  const int64_t chunk_bytes = align_down(mode.chunk_bytes, files[0]->alignment().offset);
  const Staging staging(num_slots, chunk_bytes);
  make_reader(rung, mode, {staging.memory()});
  using Clock = std::chrono::steady_clock;
  const Clock::time_point began = Clock::now();
  const int64_t bytes = sweep(*rung.reader, *files[0], staging, chunk_bytes, max_bytes);
  const double seconds = std::chrono::duration<double>(Clock::now() - began).count();
  return JsonObject()
      .add("io_mode", rung.io)
      .add("reader", rung.reader->name())
      .add("refusal", rung.refusal)
      .add("depth", static_cast<int64_t>(rung.reader->depth()))
      .add("chunk_bytes", chunk_bytes)
      .add("bytes", bytes)
      .add("seconds", seconds)
      .add("gbps", static_cast<double>(bytes) / seconds * 1e-9)
      .add("memory_alignment", files[0]->alignment().memory)
      .add("offset_alignment", files[0]->alignment().offset)
      .str();
}

}  // namespace nexus
