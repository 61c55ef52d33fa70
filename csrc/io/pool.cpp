#include "io/pool.h"

#include <utility>

namespace nexus {

PoolReader::PoolReader(int depth, std::string name, Serve serve)
    : name_(std::move(name)), serve_(std::move(serve)) {
  for (int i = 0; i < depth; ++i) threads_.emplace_back([this] { work(); });
}

PoolReader::~PoolReader() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  submitted_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void PoolReader::submit(Request* request) {
  {
    std::lock_guard lock(mutex_);
    queue_.push_back(request);
  }
  submitted_.notify_one();
}

Request* PoolReader::wait() {
  std::unique_lock lock(mutex_);
  completed_.wait(lock, [this] { return !done_.empty(); });
  Request* request = done_.front();
  done_.pop_front();
  return request;
}

void PoolReader::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    submitted_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    Request* request = queue_.front();
    queue_.pop_front();
    lock.unlock();
    request->result = serve_(*request);
    lock.lock();
    done_.push_back(request);
    completed_.notify_one();
  }
}

}  // namespace nexus
