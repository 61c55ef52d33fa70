// Engines by number: the only global. A number is what crosses the border to Python.
//
// Note [Group ids]
// A graph names a group by one number that holds both, engine and group. It is a tensor there, not
// an int, so that a graph serves every engine it is given, with another budget or other files.
// Engine numbers are never given out twice, and begin at random: a graph that was saved and loaded
// into another process names no engine there by accident.
#pragma once

#include <cstdint>
#include <memory>

#include "stream/engine.h"

namespace nexus {

struct GroupId {
  int64_t engine;
  int group;
};

// 16 M groups in one engine.
constexpr int kGroupBits = 24;

constexpr GroupId unpack_group_id(int64_t id) {
  return {id >> kGroupBits, static_cast<int>(id & ((int64_t{1} << kGroupBits) - 1))};
}

int64_t register_engine(std::shared_ptr<Engine> engine);
// Throws EngineClosed for a number that is not, or no longer, an engine.
std::shared_ptr<Engine> find_engine(int64_t handle);
// For those who answer its reads: also one that is being closed, and waits for the last of them.
// Null when there is none.
std::shared_ptr<Engine> find_engine_in_service(int64_t handle);
// Null when it was taken out before.
std::shared_ptr<Engine> unregister_engine(int64_t handle);

}  // namespace nexus
