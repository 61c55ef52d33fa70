// The ring whose kernel begins nothing: what is taken back is read by threads, every byte is right,
// and no request is forgotten. Reads are made to go through the kernel's workers, which are fewer
// than the requests, and patience is none: so some are cancelled before they were begun.
#include <liburing.h>
#include <sys/stat.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <vector>

#include "io/ladder.h"

using namespace nexus;

namespace {

constexpr int kDepth = 64;
constexpr int64_t kChunk = 64 << 10;
constexpr int kRounds = 40;

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::exit(1);
}

std::byte value_at(int64_t offset) {
  return static_cast<std::byte>((offset * 2654435761u) >> 13 & 0xff);
}

std::unique_ptr<File> write_file(const std::string& path) {
  std::vector<char> content(kDepth * kChunk);
  for (size_t i = 0; i < content.size(); ++i) {
    content[i] = static_cast<char>(value_at(static_cast<int64_t>(i)));
  }
  std::ofstream(path, std::ios::binary).write(content.data(), static_cast<int64_t>(content.size()));
  struct stat info;
  check(stat(path.c_str(), &info) == 0, "the file is there");
  const Stamp stamp = {static_cast<int64_t>(info.st_dev), static_cast<int64_t>(info.st_ino),
                       info.st_size, info.st_mtim.tv_sec * 1'000'000'000 + info.st_mtim.tv_nsec};
  return std::make_unique<File>(path, stamp);
}

// Reads the whole file through the reader, all requests at once; every byte must be right.
void read_all(Reader& reader, File& file, std::byte* memory) {
  std::memset(memory, 0xa5, kDepth * kChunk);
  std::vector<Request> requests(kDepth);
  for (int i = 0; i < kDepth; ++i) {
    requests[i] = {&file, i * kChunk, kChunk, memory + i * kChunk, 0};
    reader.submit(&requests[i]);
  }
  std::vector<bool> is_back(kDepth);
  for (int i = 0; i < kDepth; ++i) {
    const Request* request = reader.wait();
    const auto index = static_cast<size_t>(request - requests.data());
    check(index < requests.size() && !is_back[index], "each request comes back once");
    check(request->result == kChunk, "each request has all of its bytes");
    is_back[index] = true;
  }
  for (int64_t at = 0; at < kDepth * kChunk; ++at) {
    check(memory[at] == value_at(at), "each byte is the file's");
  }
}

}  // namespace

int main(int, char** arguments) {
  const std::unique_ptr<File> file = write_file(arguments[1]);
  std::byte* memory = static_cast<std::byte*>(std::aligned_alloc(4096, kDepth * kChunk));
  std::string refusal;
  int num_stalled = 0;
  for (int round = 0; round < kRounds; ++round) {
    const auto reader = make_uring_reader(kDepth, {{memory, static_cast<size_t>(kDepth * kChunk)}},
                                          refusal, {.patience_ms = 0, .sqe_flags = IOSQE_ASYNC});
    if (reader == nullptr) {
      std::printf("%s\n", refusal.c_str());
      return 0;
    }
    // What comes after a stall goes another way.
    for (int pass = 0; pass < 3; ++pass) read_all(*reader, *file, memory);
    num_stalled += reader->name() == "threads (io_uring stalled)";
  }
  check(num_stalled > 0, "some were cancelled and read by threads");
  const auto patient = make_uring_reader(kDepth, {}, refusal);
  read_all(*patient, *file, memory);
  check(patient->name() == "io_uring", "a ring that answers stays");
  std::free(memory);
}
