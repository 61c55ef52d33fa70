#include "stream/registry.h"

#include <map>
#include <random>
#include <shared_mutex>

#include "common/error.h"

namespace nexus {
namespace {

struct Registry {
  std::shared_mutex mutex;
  std::map<int64_t, std::shared_ptr<Engine>> engines;
  std::map<int64_t, std::weak_ptr<Engine>> closing;
  int64_t next = 1 + static_cast<int64_t>(std::random_device{}() >> 1);
};

// Never destroyed: at exit, threads may still be inside an engine.
Registry& registry() {
  static auto* instance = new Registry;
  return *instance;
}

}  // namespace

int64_t register_engine(std::shared_ptr<Engine> engine) {
  std::unique_lock lock(registry().mutex);
  const int64_t handle = registry().next++;
  registry().engines.emplace(handle, std::move(engine));
  return handle;
}

std::shared_ptr<Engine> find_engine(int64_t handle) {
  std::shared_lock lock(registry().mutex);
  const auto found = registry().engines.find(handle);
  if (found == registry().engines.end()) {
    fail("EngineClosed", "Engine ", handle,
         " was closed or never opened. Stream the model again to use it.");
  }
  return found->second;
}

std::shared_ptr<Engine> find_engine_in_service(int64_t handle) {
  std::shared_lock lock(registry().mutex);
  const auto found = registry().engines.find(handle);
  if (found != registry().engines.end()) return found->second;
  const auto closing = registry().closing.find(handle);
  return closing == registry().closing.end() ? nullptr : closing->second.lock();
}

std::shared_ptr<Engine> unregister_engine(int64_t handle) {
  std::unique_lock lock(registry().mutex);
  const auto found = registry().engines.find(handle);
  if (found == registry().engines.end()) return nullptr;
  std::shared_ptr<Engine> engine = std::move(found->second);
  registry().engines.erase(found);
  std::erase_if(registry().closing, [](const auto& entry) { return entry.second.expired(); });
  registry().closing.emplace(handle, engine);
  return engine;
}

}  // namespace nexus
