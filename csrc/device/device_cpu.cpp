// Plain memory. Copies are done when they return, so there is nothing to record or to wait for.
#include <cstring>

#include "device/device.h"

namespace nexus {
namespace {

class CpuDevice final : public Device {
 public:
  bool is_host() const override { return true; }

  void copy(std::byte* to, const std::byte* from, int64_t nbytes) override {
    std::memcpy(to, from, static_cast<size_t>(nbytes));
  }

  void poison(std::byte* at, int64_t nbytes) override {
    std::memset(at, 0xff, static_cast<size_t>(nbytes));
  }
};

}  // namespace

std::unique_ptr<Device> make_cpu_device() { return std::make_unique<CpuDevice>(); }

}  // namespace nexus
