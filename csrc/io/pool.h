// A pool of worker threads that serves requests with a blocking function. Owns its threads; they
// end with it, after the requests in flight.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "io/reader.h"

namespace nexus {

class PoolReader final : public Reader {
 public:
  using Serve = std::function<int64_t(const Request&)>;

  PoolReader(int depth, std::string name, Serve serve);
  ~PoolReader() override;

  int depth() const override { return static_cast<int>(threads_.size()); }
  void submit(Request* request) override;
  Request* wait() override;
  std::string name() const override { return name_; }

 private:
  void work();

  std::string name_;
  Serve serve_;
  std::mutex mutex_;
  std::condition_variable submitted_;
  std::condition_variable completed_;
  std::deque<Request*> queue_;
  std::deque<Request*> done_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace nexus
