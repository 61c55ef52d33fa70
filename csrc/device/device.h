// What streaming needs of the memory that weights end in, and of the order of work there. A device
// is a file: device_cpu.cpp, device_cuda.cpp.
//
// Note [Order on a device]
// A lane is a queue of copies; every arena has its own, so that a copy that must wait for one arena
// holds up no other (those of a pool, which may be thousands, share a few). The computation has a
// queue too, the caller's current stream, which is a lane like any other. An event is a point in a
// lane. Between lanes there are these orders, and no other:
//
//   lane waits for `free`        before it writes into an arena: its readers are through
//   current waits for `ready`    before it reads an arena: its bytes are there
//   a slot waits for `copied`    before a read overwrites it: its bytes have left
//
// The first two are waited for by lanes; nobody's thread stops. The last is asked (is_done), or, by
// the engine's own thread when it has nothing else to do, waited for (block). An event that was
// never recorded counts as complete, and so an arena is given out only when its copies are all
// enqueued.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "common/error.h"

namespace nexus {

// Owned by the device that made them; they go with it.
struct Lane {
  void* handle = nullptr;
};
struct Event {
  void* handle = nullptr;
};

// The device can do nothing any more: after a fault there is no way back but a new process.
class DeviceLost : public Error {
 public:
  explicit DeviceLost(const std::string& message) : Error("DeviceLost", message) {}
};

// Any thread may call any of these. All but `block`, `drain` and the copies of plain memory only
// enqueue. They throw DeviceError or DeviceLost; where an answer is needed to keep bytes apart
// (record, is_done, block), every failure is a loss.
class Device {
 public:
  virtual ~Device() = default;
  virtual std::string name() const = 0;
  // May the disk write straight into this device's memory, and the processor read it?
  virtual bool is_host() const = 0;

  // Readies untouched host memory that reads will land in; a hint.
  virtual void prepare(std::byte* at, int64_t nbytes) = 0;
  // Page-locks host memory (whole pages): copies from it run beside everything else.
  virtual void pin(std::span<std::byte> memory) = 0;
  // A device that is gone has unpinned everything.
  virtual void unpin(std::byte* begin) noexcept = 0;

  virtual Lane make_lane() = 0;
  virtual Event make_event() = 0;
  // What the calling thread computes on. Not to be kept.
  virtual Lane current() = 0;

  virtual void copy(Lane lane, std::byte* to, const std::byte* host, int64_t nbytes) = 0;
  virtual void copy_within(Lane lane, std::byte* to, const std::byte* from, int64_t nbytes) = 0;
  virtual void fetch(Lane lane, std::byte* host, const std::byte* from, int64_t nbytes) = 0;
  // Makes freed memory unmistakable: every float format reads these bytes as NaN.
  virtual void poison(Lane lane, std::byte* at, int64_t nbytes) = 0;

  virtual void record(Event event, Lane lane) = 0;
  virtual void wait(Lane lane, Event event) = 0;
  virtual bool is_done(Event event) = 0;
  // Stops the calling thread until then.
  virtual void block(Event event) = 0;
  // Blocks until all its lanes, and what the calling thread has enqueued, are through: memory may
  // be given back. A device that is gone is through.
  virtual void drain() noexcept = 0;
};

std::unique_ptr<Device> make_cpu_device();
std::unique_ptr<Device> make_cuda_device(int index);

}  // namespace nexus
