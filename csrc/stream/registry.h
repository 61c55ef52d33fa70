// Engines by number: the only global. A number is what crosses the border to Python and what a
// compiled graph holds; it is never given out twice.
#pragma once

#include <cstdint>
#include <memory>

#include "stream/engine.h"

namespace nexus {

int64_t register_engine(std::shared_ptr<Engine> engine);
// Throws EngineClosed for a number that is not, or no longer, an engine.
std::shared_ptr<Engine> find_engine(int64_t handle);
// Null when it was taken out before.
std::shared_ptr<Engine> unregister_engine(int64_t handle);

}  // namespace nexus
