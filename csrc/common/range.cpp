#include "common/range.h"

#include <nvtx3/nvToolsExt.h>

namespace nexus {
namespace {

// Made when the first range begins, which is when NVTX looks for a tool. Never destroyed: ranges of
// other threads may end later than static objects do.
struct Domain {
  nvtxDomainHandle_t handle = nvtxDomainCreateA("nexus");  // null without a tool
  std::array<nvtxStringHandle_t, kRangeNames.size()> names{};

  Domain() {
    if (handle == nullptr) return;
    for (size_t i = 0; i < names.size(); ++i) {
      names[i] = nvtxDomainRegisterStringA(handle, kRangeNames[i]);
    }
  }
};

const Domain& domain() {
  static const auto* const made = new Domain;
  return *made;
}

nvtxEventAttributes_t attributes(const Domain& of, RangeName name, int64_t nbytes) {
  nvtxEventAttributes_t event{};
  event.version = NVTX_VERSION;
  event.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  event.messageType = NVTX_MESSAGE_TYPE_REGISTERED;
  event.message.registered = of.names[name.index()];
  event.payloadType = NVTX_PAYLOAD_TYPE_INT64;
  event.payload.llValue = nbytes;
  return event;
}

}  // namespace

Range::Range(RangeName name, int64_t nbytes) : is_open_(domain().handle != nullptr) {
  if (!is_open_) return;
  const nvtxEventAttributes_t event = attributes(domain(), name, nbytes);
  nvtxDomainRangePushEx(domain().handle, &event);
}

Range::~Range() {
  if (is_open_) nvtxDomainRangePop(domain().handle);
}

AsyncRange::AsyncRange(RangeName name, int64_t nbytes) {
  if (domain().handle == nullptr) return;
  const nvtxEventAttributes_t event = attributes(domain(), name, nbytes);
  id_ = nvtxDomainRangeStartEx(domain().handle, &event);
}

void AsyncRange::close() {
  nvtxDomainRangeEnd(domain().handle, id_);
  id_ = 0;
}

bool has_nvtx() { return true; }

}  // namespace nexus
