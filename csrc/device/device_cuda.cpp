// An NVIDIA GPU, through its driver. Owns its lanes and events, and a share of the primary context,
// which torch uses too. Memory is the caller's: arenas come from torch's allocator.
//
// Driver calls leave the runtime's "last error" alone: what fails here, and is dealt with here, is
// not found by torch afterwards.
#include <algorithm>
#include <array>
#include <mutex>
#include <vector>

#include "device/cuda_driver.h"
#include "device/device.h"

namespace nexus {
namespace {

// Lanes must not wait for the legacy default stream, which torch computes on.
constexpr unsigned kNonBlocking = 0x1;
// Timing makes every record slower; the one thread that blocks sleeps instead of spinning.
constexpr unsigned kDisableTiming = 0x2;
constexpr unsigned kBlockingSync = 0x1;
// Pinned for every context: another engine may use another device.
constexpr unsigned kPortable = 0x1;

constexpr int kRelaxed = 2;

constexpr unsigned char kNanByte = 0xff;

// After these a context answers every call alike; see CUresult in the driver's reference.
constexpr std::array kFatal = {4,   46,  101, 201, 214, 220, 700, 702, 709,
                               710, 714, 715, 716, 717, 718, 719, 999};

bool is_fatal(CudaResult result) { return std::ranges::find(kFatal, result) != kFatal.end(); }

std::string failure(CudaResult result, const char* doing) {
  return concat("CUDA must do what is asked; ", doing, " failed with ", cuda_error_text(result),
                ". ");
}

// `doing` says what failed.
void check(CudaResult result, const char* doing) {
  if (result == kCudaSuccess) return;
  if (is_fatal(result)) {
    throw DeviceLost(failure(result, doing) +
                     "The device's context is lost: what was computed last may be the cause (run "
                     "with CUDA_LAUNCH_BLOCKING=1 to see), and a new process is needed.");
  }
  fail("DeviceError", failure(result, doing),
       "The same call may be tried again; free device memory if it is short.");
}

// For what keeps bytes apart: without an answer nobody knows what may be overwritten.
void check_order(CudaResult result, const char* doing) {
  if (result == kCudaSuccess || is_fatal(result)) return check(result, doing);
  throw DeviceLost(failure(result, doing) +
                   "Without it weights might be overwritten while they are read, so streaming ends "
                   "here. Stream the model again.");
}

// For the way out, where nothing may throw: a call that fails is asked once more, unless the device
// is lost. Nothing runs on a lost one.
template <typename Call>
CudaResult insist(const Call& call) {
  const CudaResult result = call();
  return result == kCudaSuccess || is_fatal(result) ? result : call();
}

CudaAddress address_of(const std::byte* at) { return reinterpret_cast<CudaAddress>(at); }

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index), cuda_(cuda_driver()) {
    check(cuda_.cuInit(0), "starting");
    check(cuda_.cuDeviceGet(&device_, index), "looking for the device");
    check(cuda_.cuDevicePrimaryCtxRetain(&context_, device_), "opening the device");
  }

  ~CudaDevice() override;

  std::string name() const override { return concat("cuda:", index_); }
  bool is_host() const override { return false; }

  void prepare(std::byte*, int64_t) override {}

  void pin(std::span<std::byte> memory) override {
    const Scope scope(*this);
    check(cuda_.cuMemHostRegister(memory.data(), memory.size(), kPortable), "pinning memory");
  }
  void unpin(std::byte* begin) noexcept override {
    const LastScope scope(*this);
    if (!scope.is_gone()) insist([&] { return cuda_.cuMemHostUnregister(begin); });
  }

  Lane make_lane() override {
    const Scope scope(*this);
    void* stream = nullptr;
    check(cuda_.cuStreamCreate(&stream, kNonBlocking), "making a stream");
    const std::lock_guard lock(mutex_);
    return {streams_.emplace_back(stream)};
  }

  Event make_event() override {
    const Scope scope(*this);
    void* event = nullptr;
    check(cuda_.cuEventCreate(&event, kDisableTiming | kBlockingSync), "making an event");
    const std::lock_guard lock(mutex_);
    return {events_.emplace_back(event)};
  }

  Lane current() override;

  void copy(Lane lane, std::byte* to, const std::byte* host, int64_t nbytes) override {
    const Scope scope(*this);
    check(cuda_.cuMemcpyHtoDAsync(address_of(to), host, static_cast<size_t>(nbytes), lane.handle),
          "copying to the device");
  }
  void copy_within(Lane lane, std::byte* to, const std::byte* from, int64_t nbytes) override {
    const Scope scope(*this);
    check(cuda_.cuMemcpyDtoDAsync(address_of(to), address_of(from), static_cast<size_t>(nbytes),
                                  lane.handle),
          "copying on the device");
  }
  void fetch(Lane lane, std::byte* host, const std::byte* from, int64_t nbytes) override {
    const Scope scope(*this);
    check(cuda_.cuMemcpyDtoHAsync(host, address_of(from), static_cast<size_t>(nbytes), lane.handle),
          "copying from the device");
  }
  void poison(Lane lane, std::byte* at, int64_t nbytes) override {
    const Scope scope(*this);
    check(cuda_.cuMemsetD8Async(address_of(at), kNanByte, static_cast<size_t>(nbytes), lane.handle),
          "poisoning an arena");
  }

  void record(Event event, Lane lane) override {
    const Scope scope(*this);
    check_order(cuda_.cuEventRecord(event.handle, lane.handle), "recording an event");
  }
  void wait(Lane lane, Event event) override {
    const Scope scope(*this);
    check(cuda_.cuStreamWaitEvent(lane.handle, event.handle, 0), "ordering streams");
  }
  bool is_done(Event event) override {
    const Scope scope(*this);
    const CudaResult result = cuda_.cuEventQuery(event.handle);
    if (result == kCudaNotReady) return false;
    check_order(result, "asking for a copy");
    return true;
  }
  void block(Event event) override {
    const Scope scope(*this);
    check_order(cuda_.cuEventSynchronize(event.handle), "waiting for a copy");
  }
  void drain() noexcept override;

 private:
  // The device's context is the calling thread's, for as long as this lives.
  class Scope {
   public:
    explicit Scope(const CudaDevice& device) : device_(device) {
      check_order(device_.cuda_.cuCtxPushCurrent(device_.context_), "entering the device");
      is_relaxed_ = exchange_mode() == kCudaSuccess;
    }
    ~Scope() {
      if (is_relaxed_) exchange_mode();
      device_.leave();
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    // While some thread captures a graph, no other may ask how far an event is, unless it says that
    // it knows what it does: else that capture is spoilt. What is ours is in nobody's graph.
    CudaResult exchange_mode() {
      return device_.cuda_.cuThreadExchangeStreamCaptureMode(&capture_mode_);
    }

    const CudaDevice& device_;
    int capture_mode_ = kRelaxed;
    bool is_relaxed_ = false;
  };

  // The same on the way out: of a lost device too things are given back, but at the end of the
  // process the driver may have gone before us. It says so, and then there is nothing left to give
  // back.
  class LastScope {
   public:
    explicit LastScope(const CudaDevice& device)
        : device_(device),
          result_(insist([&] { return device.cuda_.cuCtxPushCurrent(device.context_); })) {}
    ~LastScope() {
      if (result_ == kCudaSuccess) device_.leave();
    }
    LastScope(const LastScope&) = delete;
    LastScope& operator=(const LastScope&) = delete;
    bool is_gone() const { return result_ == kCudaDeinitialized; }

   private:
    const CudaDevice& device_;
    const CudaResult result_;
  };

  void leave() const noexcept {
    void* popped = nullptr;
    insist([&] { return cuda_.cuCtxPopCurrent(&popped); });
  }

  const int index_;
  const CudaDriver& cuda_;
  int device_ = 0;
  void* context_ = nullptr;
  std::mutex mutex_;
  std::vector<void*> streams_;
  std::vector<void*> events_;
};

CudaDevice::~CudaDevice() {
  {
    const LastScope scope(*this);
    if (scope.is_gone()) return;
    for (void* event : events_) insist([&] { return cuda_.cuEventDestroy(event); });
    for (void* stream : streams_) insist([&] { return cuda_.cuStreamDestroy(stream); });
  }
  insist([&] { return cuda_.cuDevicePrimaryCtxRelease(device_); });
}

Lane CudaDevice::current() {
  Lane lane;
  if (cuda_.current_stream(index_, &lane.handle) != 0) {
    fail("DeviceError", "torch must know its current stream; it has none for ", name(),
         ". Is the device visible to torch?");
  }
  const Scope scope(*this);
  int status = 0;
  check(cuda_.cuStreamIsCapturing(lane.handle, &status), "asking for a capture");
  if (status != 0) {
    fail(
        "DeviceError",
        "A CUDA graph replays kernels, not reads; a group was asked for while its stream was being "
        "captured. Use torch.compile(mode=\"reduce-overhead\"), which leaves streaming out of its "
        "graphs, or capture resident parts only.");
  }
  return lane;
}

void CudaDevice::drain() noexcept {
  const LastScope scope(*this);
  if (scope.is_gone()) return;
  const auto settle = [this](void* stream) {
    insist([&] { return cuda_.cuStreamSynchronize(stream); });
  };
  for (void* stream : streams_) settle(stream);
  void* stream = nullptr;
  if (cuda_.current_stream(index_, &stream) == 0) settle(stream);
}

}  // namespace

std::unique_ptr<Device> make_cuda_device(int index) { return std::make_unique<CudaDevice>(index); }

}  // namespace nexus
