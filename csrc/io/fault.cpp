#include "io/fault.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <map>
#include <random>
#include <thread>
#include <vector>

namespace nexus {
namespace {

using Clock = std::chrono::steady_clock;

enum class Fault { kNone, kError, kAgain, kShort, kDelay, kFlip, kRefuse };

class FaultyReader final : public Reader {
 public:
  FaultyReader(std::unique_ptr<Reader> inner, const FaultPlan& plan, FaultCounts* counts)
      : inner_(std::move(inner)),
        plan_(plan),
        counts_(counts),
        random_(static_cast<uint64_t>(plan.seed)) {}

  int depth() const override { return inner_->depth(); }
  std::string name() const override { return inner_->name(); }

  void submit(Request* request) override {
    const Fault fault = draw();
    switch (fault) {
      case Fault::kError:
        return answer(request, -EIO, counts_->errors);
      case Fault::kAgain:
        return answer(request, below(2) == 0 ? -EAGAIN : -EINTR, counts_->retries);
      case Fault::kRefuse:
        if (!request->file->is_direct()) break;
        return answer(request, -EINVAL, counts_->refusals);
      case Fault::kDelay:
        return postpone(request);
      default:
        break;
    }
    pass_on(request, fault);
  }

  Request* wait() override {
    while (true) {
      if (!ready_.empty()) {
        Request* request = ready_.back();
        ready_.pop_back();
        return request;
      }
      start_late();
      if (num_inner_ == 0) {
        std::this_thread::sleep_until(late_.begin()->first);
        continue;
      }
      receive(inner_->wait());
    }
  }

 private:
  uint64_t below(uint64_t bound) { return random_() % bound; }

  Fault draw() {
    auto chance = static_cast<int64_t>(below(1'000'000));
    const std::pair<int64_t, Fault> table[] = {
        {plan_.errno_ppm, Fault::kError}, {plan_.again_ppm, Fault::kAgain},
        {plan_.short_ppm, Fault::kShort}, {plan_.delay_ppm, Fault::kDelay},
        {plan_.flip_ppm, Fault::kFlip},   {plan_.refuse_ppm, Fault::kRefuse}};
    for (const auto& [ppm, fault] : table) {
      if (chance < ppm) return fault;
      chance -= ppm;
    }
    return Fault::kNone;
  }

  void answer(Request* request, int64_t result, std::atomic<int64_t>& count) {
    ++count;
    request->result = result;
    ready_.push_back(request);
  }

  void pass_on(Request* request, Fault fault) {
    faults_[request] = fault;
    ++num_inner_;
    inner_->submit(request);
  }

  // The read itself begins late: who does not wait for it finds the bytes missing, and who lets
  // another read into its buffer finds that one overwritten.
  void postpone(Request* request) {
    ++counts_->delays;
    const auto delay = std::chrono::microseconds(below(static_cast<uint64_t>(plan_.delay_us) + 1));
    late_.emplace(Clock::now() + delay, request);
  }

  void start_late() {
    while (!late_.empty() && late_.begin()->first <= Clock::now()) {
      pass_on(late_.begin()->second, Fault::kNone);
      late_.erase(late_.begin());
    }
  }

  void receive(Request* request) {
    --num_inner_;
    const Fault fault = faults_[request];
    faults_.erase(request);
    if (request->result > 1 && fault == Fault::kShort) shorten(request);
    if (request->result > 0 && fault == Fault::kFlip) flip(request);
    ready_.push_back(request);
  }

  // Pages used where they are mapped were never copied: spoiling them would outlive the request.
  static bool is_view(const Request& request) {
    const std::byte* mapping = request.file->mapping();
    return mapping != nullptr && request.buffer == mapping + request.offset;
  }

  // The bytes that "were not read" are spoiled, so that believing them shows.
  void shorten(Request* request) {
    ++counts_->shorts;
    const auto kept = static_cast<int64_t>(1 + below(static_cast<uint64_t>(request->result - 1)));
    if (!is_view(*request)) {
      std::fill(request->buffer + kept, request->buffer + request->result, std::byte{0xa5});
    }
    request->result = kept;
  }

  void flip(Request* request) {
    ++counts_->flips;
    const uint64_t bit = below(static_cast<uint64_t>(request->result) * 8);
    request->buffer[bit / 8] ^= std::byte(1u << (bit % 8));
  }

  std::unique_ptr<Reader> inner_;
  FaultPlan plan_;
  FaultCounts* counts_;
  std::mt19937_64 random_;
  std::map<Request*, Fault> faults_;
  std::vector<Request*> ready_;
  std::multimap<Clock::time_point, Request*> late_;
  int num_inner_ = 0;
};

}  // namespace

std::unique_ptr<Reader> make_faulty_reader(std::unique_ptr<Reader> inner, const FaultPlan& plan,
                                           FaultCounts* counts) {
  return std::make_unique<FaultyReader>(std::move(inner), plan, counts);
}

}  // namespace nexus
