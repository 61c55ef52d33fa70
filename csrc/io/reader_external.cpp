#include "io/reader_external.h"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "common/error.h"

namespace nexus {

ExternalReader::ExternalReader(int depth, std::string name, std::vector<const File*> files)
    : depth_(depth), name_(std::move(name)), files_(std::move(files)) {}

void ExternalReader::submit(Request* request) {
  const std::lock_guard lock(mutex_);
  if (refusal_ != 0) return finish(request, refusal_);
  queue_.push_back(request);
  submitted_.notify_one();
}

Request* ExternalReader::wait() {
  std::unique_lock lock(mutex_);
  completed_.wait(lock, [this] { return !done_.empty(); });
  Request* request = done_.front();
  done_.pop_front();
  return request;
}

Request* ExternalReader::try_wait() {
  const std::lock_guard lock(mutex_);
  if (done_.empty()) return nullptr;
  Request* request = done_.front();
  done_.pop_front();
  return request;
}

std::optional<ExternalReader::Order> ExternalReader::take() {
  std::unique_lock lock(mutex_);
  submitted_.wait(lock, [this] { return refusal_ != 0 || !queue_.empty(); });
  if (queue_.empty()) return std::nullopt;
  Request* request = queue_.front();
  queue_.pop_front();
  const int64_t ticket = ++num_tickets_;
  taken_[ticket] = request;
  const auto file = std::find(files_.begin(), files_.end(), request->file);
  return Order{ticket, static_cast<int>(file - files_.begin()), request->offset, request->nbytes,
               request->buffer};
}

bool ExternalReader::answer(int64_t ticket, int64_t result, const std::string& text) {
  const std::lock_guard lock(mutex_);
  const auto found = taken_.find(ticket);
  if (found == taken_.end()) {
    ++num_late_;
    return false;
  }
  Request* request = found->second;
  taken_.erase(found);
  if (result < 0) last_error_ = text;
  if (result > request->nbytes) {
    last_error_ = concat("A read returns at most what was asked for; got ", result, " bytes for ",
                         request->nbytes, ".");
    result = -EIO;
  }
  finish(request, result);
  return true;
}

void ExternalReader::abandon(const std::string& reason) {
  const std::lock_guard lock(mutex_);
  // After an orderly stop nobody is left to serve, and nothing is wrong.
  if (refusal_ == 0 || !taken_.empty()) last_error_ = reason;
  refuse_queued(-EIO);
  for (const auto& [ticket, request] : taken_) finish(request, -EIO);
  taken_.clear();
}

void ExternalReader::stop() {
  const std::lock_guard lock(mutex_);
  refuse_queued(-ECANCELED);
}

std::string ExternalReader::last_error() const {
  const std::lock_guard lock(mutex_);
  return last_error_;
}

int64_t ExternalReader::num_late() const {
  const std::lock_guard lock(mutex_);
  return num_late_;
}

void ExternalReader::finish(Request* request, int64_t result) {
  request->result = result;
  done_.push_back(request);
  completed_.notify_one();
}

// The first reason stays: a reader that was stopped was not abandoned later, and the other way
// round.
void ExternalReader::refuse_queued(int64_t result) {
  if (refusal_ == 0) refusal_ = result;
  for (Request* request : std::exchange(queue_, {})) finish(request, refusal_);
  submitted_.notify_all();
}

}  // namespace nexus
