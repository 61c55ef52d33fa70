// Checks of the reader that is served from outside, and of the reader made of two. Built and run by
// test_readers_external.py; ends with 1 and a line for the first check that fails.
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "io/pool.h"
#include "io/reader_external.h"
#include "io/reader_split.h"

namespace nexus {
namespace {

#define CHECK(condition)                                          \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s\n", __func__, __LINE__, #condition); \
      std::exit(1);                                               \
    }                                                             \
  } while (false)

constexpr int kDepth = 8;
constexpr int64_t kBytes = 64;

// Readers compare files and never look into them here.
char file_bytes[2];
File* file(int index) { return reinterpret_cast<File*>(&file_bytes[index]); }
std::vector<const File*> files() { return {file(0), file(1)}; }

std::shared_ptr<ExternalReader> make_external() {
  return std::make_shared<ExternalReader>(kDepth, "outside", files());
}

struct Read {
  Request request;
  std::vector<std::byte> bytes = std::vector<std::byte>(kBytes);

  explicit Read(int64_t offset = 0, int index = 0) {
    request = {file(index), offset, kBytes, bytes.data(), 0};
  }
  bool has_landed() const {
    return request.result == kBytes && bytes.front() == std::byte(request.offset & 0xff) &&
           bytes.back() == std::byte(request.offset & 0xff);
  }
};

void fill(std::byte* buffer, int64_t nbytes, int64_t offset) {
  std::memset(buffer, static_cast<int>(offset & 0xff), static_cast<size_t>(nbytes));
}

void pause(int64_t us) { std::this_thread::sleep_for(std::chrono::microseconds(us)); }

// Threads that serve until there is nothing more to take.
class Servers {
 public:
  Servers(std::shared_ptr<ExternalReader> reader, int count, int64_t max_pause_us = 0) {
    for (int i = 0; i < count; ++i) {
      threads_.emplace_back([reader, i, max_pause_us] {
        std::mt19937 random(static_cast<unsigned>(i));
        while (const auto order = reader->take()) {
          if (max_pause_us > 0) pause(static_cast<int64_t>(random() % max_pause_us));
          fill(order->buffer, order->nbytes, order->offset);
          CHECK(reader->answer(order->ticket, order->nbytes));
        }
      });
    }
  }
  ~Servers() {
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::vector<std::thread> threads_;
};

std::unique_ptr<Reader> make_pool(int64_t max_pause_us = 0) {
  return std::make_unique<PoolReader>(kDepth, "pool", [max_pause_us](const Request& request) {
    if (max_pause_us > 0) pause(request.offset * 7919 % max_pause_us);
    fill(request.buffer, request.nbytes, request.offset);
    return request.nbytes;
  });
}

void order_says_what_was_asked() {
  const auto reader = make_external();
  Read read(4096, 1);
  reader->submit(&read.request);
  const auto order = reader->take();
  CHECK(order && order->file == 1 && order->offset == 4096 && order->nbytes == kBytes);
  CHECK(order->buffer == read.bytes.data());
  CHECK(reader->answer(order->ticket, 7));
  CHECK(reader->wait() == &read.request && read.request.result == 7);
}

void take_waits_for_a_request() {
  const auto reader = make_external();
  Servers servers(reader, 2);
  pause(2000);
  Read read(3);
  reader->submit(&read.request);
  CHECK(reader->wait() == &read.request && read.has_landed());
  reader->stop();
}

void many_requests_come_back_once_each() {
  const auto reader = make_external();
  Servers servers(reader, 4, 200);
  std::vector<Read> reads;
  for (int i = 0; i < 400; ++i) reads.emplace_back(i);
  std::set<Request*> seen;
  size_t next = 0;
  while (seen.size() < reads.size()) {
    while (next < reads.size() && next - seen.size() < kDepth) {
      reader->submit(&reads[next++].request);
    }
    CHECK(seen.insert(reader->wait()).second);
  }
  for (const Read& read : reads) CHECK(read.has_landed());
  CHECK(reader->try_wait() == nullptr && reader->num_late() == 0);
  reader->stop();
}

void stop_refuses_what_was_not_taken_and_waits_for_the_rest() {
  const auto reader = make_external();
  Read taken(1), queued(2), later(3);
  reader->submit(&taken.request);
  reader->submit(&queued.request);
  const auto order = reader->take();
  reader->stop();
  reader->submit(&later.request);
  CHECK(!reader->take());
  CHECK(reader->wait() == &queued.request && queued.request.result == -ECANCELED);
  CHECK(reader->wait() == &later.request && later.request.result == -ECANCELED);
  CHECK(reader->try_wait() == nullptr);
  std::atomic<bool> has_written = false;
  std::thread writer([&] {
    pause(5000);
    has_written = true;
    reader->answer(order->ticket, kBytes);
  });
  CHECK(reader->wait() == &taken.request && has_written && taken.request.result == kBytes);
  writer.join();
}

void stop_wakes_those_who_take() {
  const auto reader = make_external();
  Servers servers(reader, 3);
  pause(2000);
  reader->stop();
}

void late_and_unknown_tickets_change_nothing() {
  const auto reader = make_external();
  Read read;
  reader->submit(&read.request);
  const auto order = reader->take();
  CHECK(!reader->answer(order->ticket + 1, 5));
  CHECK(reader->answer(order->ticket, 5));
  CHECK(!reader->answer(order->ticket, 6, "again"));
  CHECK(reader->wait()->result == 5 && reader->try_wait() == nullptr);
  CHECK(reader->num_late() == 2 && reader->last_error().empty());
}

void errors_keep_their_text() {
  const auto reader = make_external();
  Read first, second;
  reader->submit(&first.request);
  reader->submit(&second.request);
  CHECK(reader->answer(reader->take()->ticket, -EIO, "the cable is out"));
  CHECK(reader->wait()->result == -EIO && reader->last_error() == "the cable is out");
  CHECK(reader->answer(reader->take()->ticket, kBytes + 1));
  CHECK(reader->wait()->result == -EIO);
  CHECK(reader->last_error().find("65 bytes for 64") != std::string::npos);
}

void abandon_answers_everything_now_and_later() {
  const auto reader = make_external();
  Read taken, queued, later;
  reader->submit(&taken.request);
  reader->submit(&queued.request);
  const auto order = reader->take();
  reader->abandon("died");
  reader->submit(&later.request);
  for (int i = 0; i < 3; ++i) CHECK(reader->wait()->result == -EIO);
  CHECK(!reader->take() && reader->last_error() == "died");
  CHECK(!reader->answer(order->ticket, kBytes) && taken.request.result == -EIO);
}

void abandon_after_a_stop_is_no_error() {
  const auto reader = make_external();
  reader->stop();
  reader->abandon("ended");
  CHECK(reader->last_error().empty());
}

// Reads, and who is to serve each.
struct Routed {
  std::vector<Read> reads;
  std::map<const std::byte*, bool> is_external;

  explicit Routed(int count, const std::function<bool(int)>& choose) {
    for (int i = 0; i < count; ++i) reads.emplace_back(i);
    for (int i = 0; i < count; ++i) is_external[reads[i].bytes.data()] = choose(i);
  }
  IsExternal predicate() {
    return [this](const std::byte* buffer) { return is_external.at(buffer); };
  }
};

void run_split(const std::function<bool(int)>& choose) {
  const auto external = make_external();
  Servers servers(external, 3, 300);
  Routed routed(300, choose);
  const auto split = make_split_reader(make_pool(300), external, routed.predicate());
  CHECK(split->depth() == kDepth && split->name() == "outside, pool");
  std::set<Request*> seen;
  size_t next = 0;
  while (seen.size() < routed.reads.size()) {
    while (next < routed.reads.size() && next - seen.size() < kDepth) {
      split->submit(&routed.reads[next++].request);
    }
    CHECK(seen.insert(split->wait()).second);
  }
  for (const Read& read : routed.reads) CHECK(read.has_landed());
  external->stop();
}

void split_serves_both() {
  std::mt19937 random(1);
  run_split([&](int) { return random() % 2 == 0; });
}
void split_serves_one_alone() {
  run_split([](int) { return true; });
  run_split([](int) { return false; });
}
void split_serves_bursts() {
  run_split([](int i) { return i / 20 % 2 == 0; });
}

void split_does_not_wait_for_outside_while_the_disk_answers() {
  const auto external = make_external();
  Routed routed(2, [](int i) { return i == 0; });
  const auto split = make_split_reader(make_pool(), external, routed.predicate());
  for (Read& read : routed.reads) split->submit(&read.request);
  // Nobody serves yet: the ordinary read must come back all the same.
  CHECK(split->wait() == &routed.reads[1].request);
  const auto order = external->take();
  external->answer(order->ticket, kBytes);
  CHECK(split->wait() == &routed.reads[0].request);
}

void split_lets_neither_starve() {
  const auto external = make_external();
  Routed routed(1 + 4 * kDepth, [](int i) { return i != 0; });
  const auto split = make_split_reader(make_pool(), external, routed.predicate());
  for (Read& read : routed.reads) split->submit(&read.request);
  for (int i = 0; i < 4 * kDepth; ++i) external->answer(external->take()->ticket, kBytes);
  int turn = 0;
  while (split->wait() != &routed.reads[0].request) ++turn;
  CHECK(turn == kDepth);
  for (int i = turn; i < 4 * kDepth; ++i) split->wait();
}

void split_ends_with_requests_in_flight() {
  const auto external = make_external();
  Routed routed(6, [](int i) { return i % 2 == 0; });
  auto split = make_split_reader(make_pool(200), external, routed.predicate());
  for (Read& read : routed.reads) split->submit(&read.request);
  const auto order = external->take();
  external->stop();
  std::thread late([&] {
    pause(3000);
    fill(order->buffer, order->nbytes, order->offset);
    external->answer(order->ticket, order->nbytes);
  });
  for (size_t i = 0; i < routed.reads.size(); ++i) split->wait();
  late.join();
  CHECK(routed.reads[0].has_landed() && routed.reads[1].has_landed());
  CHECK(routed.reads[2].request.result == -ECANCELED);
}

void stop_may_come_at_any_moment() {
  for (int round = 0; round < 300; ++round) {
    const auto reader = make_external();
    Servers servers(reader, 3, round % 3 == 0 ? 50 : 0);
    std::vector<Read> reads;
    for (int i = 0; i < 12; ++i) reads.emplace_back(i);
    std::thread stopper([&] {
      pause(round % 100);
      round % 2 == 0 ? reader->stop() : pause(200);
      reader->stop();
    });
    for (Read& read : reads) reader->submit(&read.request);
    for (size_t i = 0; i < reads.size(); ++i) {
      const Request* request = reader->wait();
      CHECK(request->result == kBytes || request->result == -ECANCELED);
    }
    stopper.join();
    CHECK(reader->num_late() == 0);
  }
}

}  // namespace
}  // namespace nexus

int main() {
  using namespace nexus;
  order_says_what_was_asked();
  take_waits_for_a_request();
  many_requests_come_back_once_each();
  stop_refuses_what_was_not_taken_and_waits_for_the_rest();
  stop_wakes_those_who_take();
  late_and_unknown_tickets_change_nothing();
  errors_keep_their_text();
  abandon_answers_everything_now_and_later();
  abandon_after_a_stop_is_no_error();
  split_serves_both();
  split_serves_one_alone();
  split_serves_bursts();
  split_does_not_wait_for_outside_while_the_disk_answers();
  split_lets_neither_starve();
  split_ends_with_requests_in_flight();
  stop_may_come_at_any_moment();
}
