// A reader that is served from outside: other threads take the requests, read the bytes by whatever
// means they have, and answer. Owns what was submitted until `wait` gives it back.
//
//   submit ─▶ take ─▶ (somebody reads) ─▶ answer ─▶ wait
//
// Note [Who may still write]
// A request that was taken may be written to until it is answered, whatever happens meanwhile: so
// `stop` refuses only what nobody has taken, and `wait` returns the rest when its answer comes.
// Only `abandon` gives taken requests back unanswered; whoever calls it vouches that nothing writes
// into their buffers any more.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "io/reader.h"

namespace nexus {

class ExternalReader final : public Reader {
 public:
  // What the serving side needs of a request; the ticket stands for it.
  struct Order {
    int64_t ticket;
    int file;  // its index in `files`
    int64_t offset;
    int64_t nbytes;
    std::byte* buffer;
  };

  // Requests name one of `files`. Nothing may be in a call when the reader goes.
  ExternalReader(int depth, std::string name, std::vector<const File*> files);

  int depth() const override { return depth_; }
  std::string name() const override { return name_; }
  void submit(Request* request) override;
  Request* wait() override;
  // A request that is complete now, or null.
  Request* try_wait();

  // The serving side; any number of threads. `take` blocks until there is a request, and returns
  // nothing once the reader is stopped or abandoned.
  std::optional<Order> take();
  // `result`: bytes read, 0 at the end of the file, or -errno with a text of what was wrong. False
  // where the ticket is unknown or was answered before: it is counted and changes nothing.
  bool answer(int64_t ticket, int64_t result, const std::string& text = {});
  // Nobody serves any more: everything, now and later, is answered with EIO.
  void abandon(const std::string& reason);
  // No new work: what was not taken, now and later, is answered with ECANCELED.
  void stop();

  // What the last failed answer said, or why the reader was abandoned; empty if nothing failed.
  std::string last_error() const;
  int64_t num_late() const;

 private:
  // All expect the mutex.
  void finish(Request* request, int64_t result);
  void refuse_queued(int64_t result);

  const int depth_;
  const std::string name_;
  const std::vector<const File*> files_;

  mutable std::mutex mutex_;
  std::condition_variable submitted_;
  std::condition_variable completed_;
  std::deque<Request*> queue_;
  std::map<int64_t, Request*> taken_;  // by ticket
  std::deque<Request*> done_;
  int64_t num_tickets_ = 0;
  int64_t num_late_ = 0;
  int64_t refusal_ = 0;  // what requests are answered with at once; 0 while they are served
  std::string last_error_;
};

}  // namespace nexus
