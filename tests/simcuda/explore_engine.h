// The engine's private state, as an exploration needs it: told apart, and checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "explore_machine.h"
#include "stream/engine.h"

namespace nexus {

class Explorer {
 public:
  static uint64_t generation(const Engine& engine, int arena);
  // A thread opens the lock now.
  static void note_window(const Engine& engine, explore::Window& window);

  // All that the future depends on, of the engine and its surroundings, and nothing else: numbers
  // that only grow are told relative to each other, slots by their turn.
  static void describe(const Engine& engine, std::vector<uint8_t>& out);

  // What holds at every moment, and what holds when nothing can move any more.
  static void check(const Engine& engine);
  static void check_end(const Engine& engine);

 private:
  class Description;
  static int arena_at_hand(const Engine& engine);
};

}  // namespace nexus
