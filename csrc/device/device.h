// What streaming needs of the memory that weights end in. A device is a file: device_cpu.cpp here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace nexus {

class Device {
 public:
  virtual ~Device() = default;
  // May the disk write straight into this device's memory?
  virtual bool is_host() const = 0;
  // Readies untouched memory that reads will land in; a hint.
  virtual void prepare(std::byte* at, int64_t nbytes) = 0;
  // Moves staged bytes to their place. `from` may be reused on return.
  virtual void copy(std::byte* to, const std::byte* from, int64_t nbytes) = 0;
  // Makes freed memory unmistakable: every float format reads these bytes as NaN.
  virtual void poison(std::byte* at, int64_t nbytes) = 0;
};

std::unique_ptr<Device> make_cpu_device();

}  // namespace nexus
