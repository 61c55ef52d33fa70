#include "gate.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <string_view>

namespace simcuda {
namespace {

const char* const kDroppable[] = {"wait:lane",      "wait:current", "record:lane",
                                  "record:current", "query",        "synchronize"};

// A test may leave the version out.
std::string_view without_version(std::string_view name) {
  return name.ends_with("_v2") ? name.substr(0, name.size() - 3) : name;
}

bool is_meant(const Failure& failure, const char* name, bool is_driver) {
  if (failure.call == "*") return is_driver;
  return without_version(failure.call) == without_version(name);
}

CUresult check_state(Needs needs, Call& in) {
  if (needs <= Needs::kLibrary) return kSuccess;
  if (!world.is_initialised) return kNotInitialized;
  if (needs == Needs::kDriver) return kSuccess;
  if (in.thread.contexts.empty()) return kInvalidContext;
  in.device = in.thread.contexts.back();
  return world.retains[in.device] > 0 ? kSuccess : kContextIsDestroyed;
}

CUresult pass(const char* name, Needs needs, bool lets_go, const Body& body) {
  // CUDA does not survive a fork, and another thread may have held the lock.
  static const pid_t owner = getpid();
  if (getpid() != owner) return kNotInitialized;

  Lock lock(world.mutex);
  Call in{lock, this_thread()};
  if (world.is_deinitialised) ++world.counts.num_calls_after_shutdown;
  if (needs == Needs::kNothing) {
    ++world.calls[name];
    return body(in);
  }
  const CUresult failure = injected_failure(name, true);
  if (world.is_deinitialised) return kDeinitialized;
  if (world.lost != kSuccess) {
    if (lets_go && world.is_initialised) body(in);
    return world.lost;
  }
  if (failure != kSuccess) return failure;
  const CUresult state = check_state(needs, in);
  return state == kSuccess ? body(in) : state;
}

}  // namespace

StreamPtr Call::stream(CUstream handle) const {
  const bool is_legacy = reinterpret_cast<uintptr_t>(handle) <= 1;  // null, CU_STREAM_LEGACY
  if (is_legacy) return legacy_stream(device);
  const auto found = world.streams.find(handle);
  if (found != world.streams.end()) return found->second;
  ++world.counts.num_bad_handles;
  return nullptr;
}

EventPtr Call::event(CUevent handle) const {
  const auto found = world.events.find(handle);
  if (found != world.events.end()) return found->second;
  ++world.counts.num_bad_handles;
  return nullptr;
}

CUresult call(const char* name, Needs needs, const Body& body) {
  return pass(name, needs, false, body);
}

CUresult release_call(const char* name, Needs needs, const Body& body) {
  return pass(name, needs, true, body);
}

CUresult injected_failure(const char* name, bool is_driver) {
  ++world.calls[name];
  CUresult code = kSuccess;
  for (Failure& failure : world.failures) {
    if (!is_meant(failure, name, is_driver) || failure.countdown-- != 0) continue;
    ++world.counts.num_failures;
    if (failure.sticky) lose(failure.code);
    code = failure.code;
  }
  return code;
}

bool is_dropped(const std::string& what) {
  bool dropped = false;
  for (Drop& drop : world.drops) {
    if (drop.what != what) continue;
    const int64_t number = drop.num_seen++;
    dropped = dropped || drop.only < 0 || drop.only == number;
  }
  if (dropped) ++world.counts.num_dropped;
  return dropped;
}

bool set_drops(const std::string& text) {
  std::vector<Drop> drops;
  std::istringstream words(text);
  for (std::string word; std::getline(words, word, ',');) {
    const size_t hash = word.find('#');
    Drop drop{.what = word.substr(0, hash)};
    if (hash != std::string::npos) drop.only = std::atoll(word.c_str() + hash + 1);
    if (std::ranges::find(kDroppable, drop.what) == std::end(kDroppable)) return false;
    drops.push_back(drop);
  }
  world.drops = std::move(drops);
  return true;
}

}  // namespace simcuda
