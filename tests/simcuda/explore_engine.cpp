#include "explore_engine.h"

#include <algorithm>

#include "explore_fibers.h"
#include "explore_machine.h"

namespace nexus {

using explore::machine;
using explore::violate;

uint64_t Explorer::generation(const Engine& engine, int arena) {
  return arena < 0 ? 0 : engine.arenas_[static_cast<size_t>(arena)].generation;
}

// -- what a state is ---------------------------------------------------------------------------

class Explorer::Description {
 public:
  Description(const Engine& engine, std::vector<uint8_t>& out) : engine_(engine), out_(out) {}

  void write() {
    write_engine();
    for (const Engine::Arena& arena : engine_.arenas_) write_arena(arena);
    for (const Group& group : engine_.groups_) write_group(group);
    for (size_t i = 0; i < engine_.chunks_.size(); ++i) write_chunk(chunk_by_turn(i));
    write_machine();
    for (int i = 0; i < explore::num_fibers(); ++i) write_fiber(i);
  }

 private:
  void put(int64_t value) { out_.push_back(static_cast<uint8_t>(value)); }
  void put_bytes(const void* at, size_t nbytes) {
    const auto* first = static_cast<const uint8_t*>(at);
    out_.insert(out_.end(), first, first + nbytes);
  }
  // All bytes of a piece are the same.
  void put_pieces(const std::byte* at, int64_t nbytes) {
    for (int64_t i = 0; i < nbytes; i += explore::unit()) put(static_cast<int64_t>(at[i]));
  }
  template <typename Numbers>
  void put_all(const Numbers& numbers) {
    put(static_cast<int64_t>(numbers.size()));
    for (const auto number : numbers) put(static_cast<int64_t>(number));
  }

  // Generations only matter beside that of their arena now.
  void put_age(int arena, uint64_t generation) {
    put(static_cast<int64_t>(generation_of(arena) - generation));
  }
  uint64_t generation_of(int arena) const { return Explorer::generation(engine_, arena); }

  // A record that still stands in a lane is where it stands; any other has happened.
  void put_ticket(uint32_t ticket) {
    const auto& lanes = machine().lanes;
    for (size_t i = 0; ticket != 0 && i < lanes.size(); ++i) {
      for (size_t k = 0; k < lanes[i].size(); ++k) {
        if (lanes[i][k].kind != explore::Op::Kind::kRecord || lanes[i][k].ticket != ticket)
          continue;
        put(static_cast<int64_t>(i));
        put(static_cast<int64_t>(k));
        return;
      }
    }
    put(-1);
  }
  void put_event(const Event& event) { put_ticket(explore::ticket_of(event.handle)); }

  // Slots are taken in turn: the one whose turn it is comes first, whatever its number.
  const Engine::Chunk& chunk_by_turn(size_t turn) const {
    return engine_.chunks_[(engine_.next_chunk_ + turn) % engine_.chunks_.size()];
  }
  int64_t turn_of(const Request* request) const {
    for (size_t turn = 0; turn < engine_.chunks_.size(); ++turn) {
      if (&chunk_by_turn(turn).request == request) return static_cast<int64_t>(turn);
    }
    return -1;
  }

  void write_engine() {
    put(engine_.current_);
    put(engine_.has_begun_);
    put(engine_.is_closing_);
    put(engine_.num_in_flight_);
    put(static_cast<int64_t>(engine_.verify_));
    put(engine_.owner_ != kNobody);
    put_all(engine_.awaited_);
    put_all(engine_.residents_);
    put_all(engine_.queue_);
    put_all(engine_.ahead_);
    put_all(engine_.left_behind_);
  }

  void write_arena(const Engine::Arena& arena) {
    put(static_cast<int64_t>(arena.state));
    put(arena.group);
    put(arena.is_cloned | arena.is_held << 1 | arena.is_retry << 2 | arena.is_settled << 3 |
        arena.is_left << 4);
    put(arena.acquired_generation
            ? static_cast<int64_t>(arena.generation - *arena.acquired_generation)
            : -1);
    put(arena.in_flight);
    put(arena.stale_in_flight);
    put_event(arena.free);
    put_event(arena.ready);
    if (arena.state == Engine::State::kLoading) write_load(*arena.load, arena.group);
  }

  // Its pieces go out in order; which of them are back, the chunks tell.
  void write_load(const Load& load, int group) {
    Load rest(load);
    while (rest.has_next()) put(static_cast<int64_t>(rest.take_next()));
    put(load.is_complete());
    put(load.is_hashed());
    put(load.is_unseen());
    if (!load.is_hashed()) return;
    for (size_t i = 0; i < engine_.group_at(group).pieces.size(); ++i) {
      put(load.is_through_with(i));
    }
    const uint64_t digest = load.digest();
    put_bytes(&digest, sizeof(digest));
  }

  void write_group(const Group& group) {
    put(group.is_verified | group.stays_in_ram << 1 | group.digest.has_value() << 2);
    if (group.ram == nullptr) return put(-1);
    put(group.ram->is_filled);
    put_pieces(group.ram->data(), group.nbytes);
  }

  void write_chunk(const Engine::Chunk& chunk) {
    put_event(chunk.copied);
    const bool is_current = chunk.arena >= 0 && engine_.is_current(chunk);
    const bool is_kept = chunk.holds_bytes && is_current;
    put(chunk.is_reading | is_kept << 1);
    if (!chunk.is_reading && !is_kept) return;
    put(is_current);
    put(chunk.arena);
    put(chunk.group);
    put(static_cast<int64_t>(chunk.piece));
    put(chunk.num_read);
    put(chunk.attempts);
    const Piece& piece = engine_.piece_of(chunk);
    if (std::ranges::find(machine().reading, &chunk.request) != machine().reading.end()) {
      return put(-1);
    }
    put(chunk.request.result);
    put_pieces(engine_.window_of(chunk), piece.window_nbytes);
  }

  void write_machine() {
    const explore::Machine& now = machine();
    put(now.num_steps);
    put(now.num_errors);
    put(now.num_agains);
    put(now.num_flips);
    put_bytes(now.has_failed, sizeof(now.has_failed));
    // In what order reads were asked for is nobody's concern; their answers are taken in turn.
    put(static_cast<int64_t>(now.answers.size()));
    for (const Request* answer : now.answers) put(turn_of(answer));
    for (const auto& lane : now.lanes) {
      put(static_cast<int64_t>(lane.size()));
      for (const explore::Op& op : lane) write_op(op);
    }
    put_pieces(now.memory.data(), static_cast<int64_t>(now.memory.size()));
  }

  void write_op(const explore::Op& op) {
    put(static_cast<int64_t>(op.kind));
    put(op.group);
    if (op.kind == explore::Op::Kind::kRecord) return;  // whoever asks for it says so
    if (op.kind == explore::Op::Kind::kWait) return put_ticket(op.ticket);
    write_place(op.to);
    if (op.to != nullptr && explore::arena_at(op.to) >= 0) {
      put_age(explore::arena_at(op.to), op.comes_after);
    }
    if (op.from == nullptr) return;
    write_place(op.from);
    if (explore::arena_at(op.from) >= 0) {
      put_age(explore::arena_at(op.from), op.generation);
    } else {
      put_pieces(op.from, op.nbytes);
    }
  }

  void write_place(const std::byte* at) {
    const std::byte* const first = machine().memory.data();
    const bool is_ours = explore::arena_at(at) >= 0 || explore::clone_at(at) >= 0;
    put(is_ours ? (at - first) / explore::unit() : -1);
  }

  // Where it stands is what it waits for, and what it did since it opened the lock.
  void write_fiber(int index) {
    const explore::Fiber& fiber = explore::fiber(index);
    put(static_cast<int64_t>(fiber.wants));
    put(fiber.is_noticed | fiber.holds_turn << 1);
    if (fiber.wants == explore::Wants::kNotice) put(fiber.what == &engine_.work_);
    if (fiber.wants == explore::Wants::kEvent) {
      put_ticket(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(fiber.what)));
    }
    if (fiber.wants == explore::Wants::kLock || fiber.wants == explore::Wants::kEvent) {
      write_window(machine().windows[index], index == explore::kEngine);
    }
  }

  // Without a call it lands a piece, or stands before a lock that it takes for the first time.
  void write_window(const explore::Window& window, bool is_engine) {
    put(window.first_call);
    if (window.num_calls == 0) return put(is_engine ? turn_of(machine().taken) : -1);
    const bool only_blocks = is_engine && window.first_call == 'B';
    if (only_blocks) return;
    put(window.num_calls);
    put(window.arena);
    for (size_t i = 0; i < engine_.arenas_.size(); ++i) {
      if (is_engine && static_cast<int>(i) != window.arena) continue;
      put(engine_.arenas_[i].generation == window.generations[i]);
      if (window.first_call == 'P') put(window.groups[i]);
    }
  }

  const Engine& engine_;
  std::vector<uint8_t>& out_;
};

void Explorer::describe(const Engine& engine, std::vector<uint8_t>& out) {
  Description(engine, out).write();
}

// -- what holds --------------------------------------------------------------------------------

void Explorer::note_window(const Engine& engine, explore::Window& window) {
  window = {};
  for (size_t i = 0; i < engine.arenas_.size(); ++i) {
    window.generations[i] = engine.arenas_[i].generation;
    window.groups[i] = engine.arenas_[i].group;
  }
  window.arena = arena_at_hand(engine);
}

// What the engine's thread works on besides a piece: the load that the last answer completed, which
// it would have landed otherwise, or its errand.
int Explorer::arena_at_hand(const Engine& engine) {
  for (const Engine::Chunk& chunk : engine.chunks_) {
    if (&chunk.request != machine().taken || !engine.is_current(chunk)) continue;
    if (chunk.load->is_complete()) return chunk.arena;
  }
  return engine.errand_ ? static_cast<int>(*engine.errand_) : -1;
}

void Explorer::check(const Engine& engine) {
  const explore::Machine& now = machine();
  const auto under_way = now.reading.size() + now.answers.size();
  if (static_cast<size_t>(engine.num_in_flight_) != under_way) {
    violate("the engine counts %d reads in flight; there are %zu", engine.num_in_flight_,
            under_way);
  }
  for (size_t i = 0; i < engine.arenas_.size(); ++i) {
    const Engine::Arena& arena = engine.arenas_[i];
    int fresh = 0;
    int stale = 0;
    for (const Engine::Chunk& chunk : engine.chunks_) {
      if (!chunk.is_reading || chunk.arena != static_cast<int>(i)) continue;
      ++(chunk.generation == arena.generation ? fresh : stale);
    }
    if (fresh != arena.in_flight || stale != arena.stale_in_flight) {
      violate("arena %zu counts %d reads and %d stale ones; there are %d and %d", i,
              arena.in_flight, arena.stale_in_flight, fresh, stale);
    }
  }
}

void Explorer::check_end(const Engine& engine) {
  const explore::Machine& now = machine();
  const Engine::Counters& counts = engine.counters_;
  if (!explore::is_at_rest()) violate("reads or copies are under way for ever");
  for (const Engine::Arena& arena : engine.arenas_) {
    if (arena.state == Engine::State::kLoading && !engine.is_closing_) {
      violate("the load of group %d is forgotten", arena.group);
    }
  }
  const auto expect_equal = [](const char* what, int64_t counted, int64_t happened) {
    if (counted == happened) return;
    violate("%s: the engine counts %lld, and there were %lld", what,
            static_cast<long long>(counted), static_cast<long long>(happened));
  };
  expect_equal("reads", counts.num_reads, now.num_submitted);
  expect_equal("copies", counts.num_copies, now.num_copied);
  expect_equal("acquires", counts.num_hits + counts.num_resident_hits + counts.num_waits,
               now.num_acquired);
  const int64_t ended = counts.num_landed + counts.num_failed;
  if (ended > counts.num_loads) violate("more loads ended than began");
}

}  // namespace nexus
