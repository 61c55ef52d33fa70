// A tool as NVTX knows them, for tests/test_profiling.py: writes what it is told, one JSON object a
// line, to the file NEXUS_TEST_EVENTS.
#include <nvtx3/nvToolsExt.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>

namespace {

// What the handles point at; alive as long as the process.
using Text = std::string;

std::atomic<uint64_t> num_started{0};

void write(const char* event, const char* rest) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  static std::FILE* const file = std::fopen(std::getenv("NEXUS_TEST_EVENTS"), "a");
  std::fprintf(file,
               R"({"event": "%s", "thread": %ld%s})"
               "\n",
               event, syscall(SYS_gettid), rest);
  std::fflush(file);
}

template <typename Handle>
const char* text_of(Handle handle) {
  return handle == nullptr ? "" : reinterpret_cast<Text*>(handle)->c_str();
}

void write_begin(const char* event, nvtxDomainHandle_t domain, const nvtxEventAttributes_t* with,
                 uint64_t id) {
  const char* name = with->messageType == NVTX_MESSAGE_TYPE_REGISTERED
                         ? text_of(with->message.registered)
                         : "(not registered)";
  const bool is_int64 = with->payloadType == NVTX_PAYLOAD_TYPE_INT64;
  char rest[256];
  std::snprintf(rest, sizeof(rest),
                R"(, "domain": "%s", "name": "%s", "nbytes": %)" PRId64 R"(, "id": %)" PRIu64,
                text_of(domain), name, is_int64 ? with->payload.llValue : -1, id);
  write(event, rest);
}

void write_end(const char* event, nvtxDomainHandle_t domain, uint64_t id) {
  char rest[128];
  std::snprintf(rest, sizeof(rest), R"(, "domain": "%s", "id": %)" PRIu64, text_of(domain), id);
  write(event, rest);
}

nvtxDomainHandle_t NVTX_API create(const char* name) {
  return reinterpret_cast<nvtxDomainHandle_t>(new Text(name));
}

nvtxStringHandle_t NVTX_API register_string(nvtxDomainHandle_t, const char* text) {
  return reinterpret_cast<nvtxStringHandle_t>(new Text(text));
}

int NVTX_API push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* with) {
  write_begin("push", domain, with, 0);
  return 0;
}

int NVTX_API pop(nvtxDomainHandle_t domain) {
  write_end("pop", domain, 0);
  return 0;
}

nvtxRangeId_t NVTX_API start(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* with) {
  const uint64_t id = ++num_started;
  write_begin("start", domain, with, id);
  return id;
}

void NVTX_API end(nvtxDomainHandle_t domain, nvtxRangeId_t id) { write_end("end", domain, id); }

template <typename Function>
void hook(NvtxFunctionTable table, int number, Function* function) {
  *table[number] = reinterpret_cast<NvtxFunctionPointer>(function);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjectionNvtx2(
    NvtxGetExportTableFunc_t get_table) {
  const auto* callbacks =
      static_cast<const NvtxExportTableCallbacks*>(get_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned int size = 0;
  if (callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size) == 0) return 0;
  hook(table, NVTX_CBID_CORE2_DomainCreateA, create);
  hook(table, NVTX_CBID_CORE2_DomainRegisterStringA, register_string);
  hook(table, NVTX_CBID_CORE2_DomainRangePushEx, push);
  hook(table, NVTX_CBID_CORE2_DomainRangePop, pop);
  hook(table, NVTX_CBID_CORE2_DomainRangeStartEx, start);
  hook(table, NVTX_CBID_CORE2_DomainRangeEnd, end);
  return 1;
}
