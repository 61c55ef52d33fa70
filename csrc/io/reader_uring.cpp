// io_uring: one ring, owned by the engine's one I/O thread, never shared. Buffers and files are
// registered where the kernel lets us, which cuts the CPU cost of a read to a third; where it does
// not (memory lock limit), plain reads do the same work. Rules of the ring: every completion is
// matched by slot and generation, a full queue is never an error, no request is forgotten.
//
// Note [Reads that nobody begins]
// What cannot be read without blocking (pages to be written first, a place on the disk that must be
// looked up) the kernel hands to its own workers. Linux 6.18 was seen to lose them: requests waited
// for a worker that was never made, for ever, in this ring and in every later one of the thread. So
// when nothing has completed for a while, everything that was not begun is cancelled; what comes
// back cancelled is read by threads, and so is all that comes after. What the disk has begun cannot
// be cancelled and completes as ever: a slow disk costs the ring, never a request.
#include <liburing.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <map>
#include <utility>

#include "common/align.h"
#include "common/error.h"
#include "io/reader.h"

namespace nexus {
namespace {

// The kernel refuses to register more than 1 GiB as one buffer.
constexpr int64_t kMaxRegistered = 1 << 30;
// Of completions that belong to no request: liburing's own value for its timeouts.
constexpr uint64_t kNoRequest = LIBURING_UDATA_TIMEOUT;

class UringReader final : public Reader {
 public:
  UringReader(int depth, const Buffers& buffers, const UringOptions& options)
      : options_(options), slots_(static_cast<size_t>(depth)) {
    const int error = io_uring_queue_init(static_cast<unsigned>(depth), &ring_, 0);
    if (error < 0) throw std::runtime_error(std::strerror(-error));
    register_buffers(buffers);
  }

  ~UringReader() override { io_uring_queue_exit(&ring_); }

  int depth() const override { return static_cast<int>(slots_.size()); }

  std::string name() const override {
    if (is_stalled_) return "threads (io_uring stalled)";
    return regions_.empty() ? "io_uring" : "io_uring+fixed";
  }

  void submit(Request* request) override {
    if (threads_ != nullptr) return threads_->submit(request);
    const size_t index = free_slot();
    Slot& slot = slots_[index];
    slot.request = request;
    ++slot.generation;
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    // As many entries as slots, and each submission is flushed at once: there is room unless the
    // kernel has stopped taking them. Asking again flushes again.
    if (sqe == nullptr) return refused_.push_back({&slot, -EAGAIN});
    prepare(sqe, *request);
    sqe->flags |= static_cast<uint8_t>(options_.sqe_flags);
    io_uring_sqe_set_data64(sqe, slot.generation << 32 | index);
    flush(sqe, slot);
  }

  Request* wait() override {
    while (true) {
      if (!refused_.empty()) return take_refused();
      // All that the ring still owes comes first.
      if (threads_ != nullptr && is_idle()) return threads_->wait();
      io_uring_cqe* cqe = nullptr;
      const int error = wait_for_a_while(&cqe);
      if (error == -EINTR || error == -EAGAIN) continue;
      if (error == -ETIME) {
        cancel_all();
        continue;
      }
      if (error < 0) fail("EngineError", "io_uring_wait_cqe failed: ", std::strerror(-error));
      const uint64_t tag = io_uring_cqe_get_data64(cqe);
      const int64_t result = cqe->res;
      io_uring_cqe_seen(&ring_, cqe);
      if (tag == kNoRequest) continue;
      Slot& slot = slots_[tag & 0xffffffffu];
      // A completion of an earlier life of the slot is not believed.
      if (slot.request == nullptr || slot.generation != tag >> 32) continue;
      if (result != -ECANCELED) return take(slot, result);
      pass_on(slot);
    }
  }

 private:
  struct Slot {
    Request* request = nullptr;
    uint64_t generation = 0;
  };

  size_t free_slot() const {
    const auto slot = std::find_if(slots_.begin(), slots_.end(),
                                   [](const Slot& s) { return s.request == nullptr; });
    return static_cast<size_t>(slot - slots_.begin());
  }

  bool is_idle() const {
    return std::all_of(slots_.begin(), slots_.end(),
                       [](const Slot& s) { return s.request == nullptr; });
  }

  int wait_for_a_while(io_uring_cqe** cqe) {
    // Older kernels would need an entry in the queue for it; they have not been seen to stall.
    if ((ring_.features & IORING_FEAT_EXT_ARG) == 0) return io_uring_wait_cqe(&ring_, cqe);
    __kernel_timespec patience = {options_.patience_ms / 1000,
                                  options_.patience_ms % 1000 * 1'000'000};
    return io_uring_wait_cqe_timeout(&ring_, cqe, &patience);
  }

  // See Note [Reads that nobody begins]. Kernels before 5.19 answer EINVAL: then it is waited on.
  void cancel_all() {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    if (sqe == nullptr) return;
    io_uring_prep_nop(sqe);
    sqe->opcode = IORING_OP_ASYNC_CANCEL;
    sqe->cancel_flags = IORING_ASYNC_CANCEL_ALL | IORING_ASYNC_CANCEL_ANY;
    io_uring_sqe_set_data64(sqe, kNoRequest);
    io_uring_submit(&ring_);
  }

  // The ring has given a request back without an answer.
  void pass_on(Slot& slot) {
    if (threads_ == nullptr) threads_ = make_threads_reader(depth(), true);
    is_stalled_ = true;
    threads_->submit(std::exchange(slot.request, nullptr));
  }

  static Request* take(Slot& slot, int64_t result) {
    Request* request = std::exchange(slot.request, nullptr);
    request->result = result;
    // Direct reads were refused after the start: what now passes the page cache must not stay.
    if (result > 0 && !request->file->is_direct()) request->file->drop(request->offset, result);
    return request;
  }

  void prepare(io_uring_sqe* sqe, const Request& request) const {
    const int descriptor = request.file->descriptor();
    const auto nbytes = static_cast<unsigned>(request.nbytes);
    const auto offset = static_cast<uint64_t>(request.offset);
    const int region = region_of(request);
    if (region >= 0) {
      io_uring_prep_read_fixed(sqe, descriptor, request.buffer, nbytes, offset, region);
    } else {
      io_uring_prep_read(sqe, descriptor, request.buffer, nbytes, offset);
    }
  }

  void flush(io_uring_sqe* sqe, Slot& slot) {
    int submitted = 0;
    do {
      submitted = io_uring_submit(&ring_);
    } while (submitted == -EINTR || submitted == -EAGAIN || submitted == -EBUSY);
    if (submitted >= 0) return;
    // The entry stays in the queue, and must not read into a buffer that was given back.
    const uint64_t tag = sqe->user_data;
    io_uring_prep_nop(sqe);
    io_uring_sqe_set_data64(sqe, tag);
    // The request is answered through the one way out, like every other.
    refused_.push_back({&slot, submitted});
  }

  Request* take_refused() {
    const auto [slot, error] = refused_.back();
    refused_.pop_back();
    return take(*slot, error);
  }

  void register_buffers(const Buffers& buffers) {
    std::vector<iovec> vectors;
    for (const auto& buffer : buffers) {
      for (size_t at = 0; at < buffer.size(); at += kMaxRegistered) {
        vectors.push_back(
            {buffer.data() + at, std::min<size_t>(buffer.size() - at, kMaxRegistered)});
      }
    }
    if (vectors.empty()) return;
    // A refusal (RLIMIT_MEMLOCK) only costs CPU time; name() tells which way it went.
    if (io_uring_register_buffers(&ring_, vectors.data(), static_cast<unsigned>(vectors.size())) <
        0) {
      return;
    }
    for (size_t i = 0; i < vectors.size(); ++i) {
      regions_[static_cast<std::byte*>(vectors[i].iov_base)] = {static_cast<int>(i),
                                                                vectors[i].iov_len};
    }
  }

  // The registered buffer that holds the whole request, or -1.
  int region_of(const Request& request) const {
    auto next = regions_.upper_bound(request.buffer);
    if (next == regions_.begin()) return -1;
    const auto& [begin, region] = *std::prev(next);
    const bool inside = request.buffer + request.nbytes <= begin + region.nbytes;
    return inside ? region.index : -1;
  }

  struct Region {
    int index;
    size_t nbytes;
  };
  struct Refused {
    Slot* slot;
    int error;
  };

  UringOptions options_;
  io_uring ring_ = {};
  std::vector<Slot> slots_;
  // Who reads once the ring has stalled; null before.
  std::unique_ptr<Reader> threads_;
  std::atomic<bool> is_stalled_ = false;  // for the report, from any thread
  std::vector<Refused> refused_;
  std::map<std::byte*, Region> regions_;
};

}  // namespace

std::unique_ptr<Reader> make_uring_reader(int depth, const Buffers& buffers, std::string& refusal,
                                          const UringOptions& options) {
  try {
    return std::make_unique<UringReader>(depth, buffers, options);
  } catch (const std::runtime_error& error) {
    refusal = concat("io_uring is denied here: ", error.what());
    return nullptr;
  }
}

}  // namespace nexus
