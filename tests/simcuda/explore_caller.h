// The caller of an exploration: it makes an engine, and goes through its script.
#pragma once

#include "explore_machine.h"

namespace explore {

// Empties the world and makes the caller's thread. Nothing runs yet.
void begin_world(const Config& config);

}  // namespace explore
