// Pooled groups: who is in which arena is the caller's to say, group by group.
//
//   place ──▶ loading ──▶ landed ──collect──▶ in use ──place another, evict──▶ gone
//                └─▶ failed ──collect──▶ gone
//
// A group is placed while its arena holds it or is to hold it, and nothing else says so: an arena
// that is given to another group forgets the one before.
//
// Note [What a pool is ordered by]
// The caller's stream, and no acquire, tells when an arena's readers are through: whoever gives an
// arena away, or empties it, has enqueued them all. `free` is recorded there and then, and the
// load that comes next waits for it.
#include <algorithm>
#include <utility>

#include "common/bounds.h"
#include "common/clock.h"
#include "common/error.h"
#include "common/unlocked.h"
#include "stream/engine.h"

namespace nexus {
namespace {

// Reads that land in place want memory and file to agree about the place in a page.
constexpr uintptr_t kPageBytes = 4096;

uintptr_t place_in_page(const std::byte* at) {
  return reinterpret_cast<uintptr_t>(at) % kPageBytes;
}

}  // namespace

void Engine::place(const std::vector<int>& groups, const std::vector<int>& arenas, bool is_ahead) {
  const std::unique_lock lock = enter();
  if (groups.size() != arenas.size()) {
    fail("EngineError", "Each group is placed in one arena; got ", groups.size(), " groups and ",
         arenas.size(), " arenas.");
  }
  for (size_t i = 0; i < groups.size(); ++i) check_place(groups[i], arenas[i]);
  if (groups.empty()) return;
  try {
    const Lane caller = device_->current();
    // A place in the queue is that of a load, and not of the arena.
    std::erase_if(placed_, [this](size_t i) { return arenas_[i].state != State::kLoading; });
    for (size_t i = 0; i < groups.size(); ++i) place_one(groups[i], arenas[i], is_ahead, caller);
  } catch (const DeviceLost& lost) {
    lose(lost.what());
    throw;
  }
  schedule();
}

void Engine::place_one(int number, int to, bool is_ahead, Lane caller) {
  const auto index = static_cast<size_t>(to);
  Group& group = group_at(number);
  Arena& arena = arenas_[index];
  if (arena.group == number && arena.state != State::kFailed) {
    if (is_ahead || !std::exchange(arena.is_ahead, false)) return;
    // Now it is as urgent as others that were before it.
    if (std::erase(placed_, index) > 0) placed_.push_back(index);
    return;
  }
  if (is_placed(number)) vacate(arena_of(number), caller);
  vacate(arena, caller);
  group.arena = to;
  arena.is_ahead = is_ahead;
  placed_.push_back(index);
  begin(arena, number);
}

// The arena is empty, when the caller's stream has come this far; a load on its way there is given
// up. Who waits for it is told.
void Engine::vacate(Arena& arena, Lane caller) {
  const int group = arena.group;
  if (group < 0) return;
  // What landed and was not collected goes as if it was.
  if (arena.state == State::kLanded && !arena.acquired_generation) {
    arena.acquired_generation = arena.generation;
  }
  free_arena(arena, group, caller);
  if (arena.state == State::kLoading) std::erase(placed_, index_of(arena));
  begin_generation(arena);
  arena.group = -1;
  arena.state = State::kEmpty;
  landed_.notify_all();
}

std::vector<int> Engine::collect(const std::vector<int>& groups, int64_t at_least) {
  std::unique_lock lock = enter();
  for (const int group : groups) check_placed(group);
  if (groups.empty()) return {};
  const auto most = static_cast<int64_t>(groups.size());
  const auto wanted = static_cast<size_t>(std::clamp(at_least, int64_t{0}, most));
  try {
    const Lane caller = device_->current();
    fail_placed(groups);
    std::vector<int> landed = landed_of(groups);
    counters_.num_hits += static_cast<int64_t>(landed.size());
    if (landed.size() < wanted) {
      await_placed(lock, groups, wanted);
      landed = landed_of(groups);
      counters_.num_waits += static_cast<int64_t>(landed.size() - wanted);
    }
    for (const int group : landed) take_placed(group, caller);
    return landed;
  } catch (const DeviceLost& lost) {
    lose(lost.what());
    throw;
  }
}

std::vector<int> Engine::landed_of(const std::vector<int>& groups) const {
  std::vector<int> landed;
  std::ranges::copy_if(groups, std::back_inserter(landed), [this](int group) {
    return is_placed(group) && arena_of(group).state == State::kLanded;
  });
  return landed;
}

// Waits on the host until `at_least` of the groups have landed. Counts the time as stall.
void Engine::await_placed(std::unique_lock<std::mutex>& lock, const std::vector<int>& groups,
                          size_t at_least) {
  std::vector<int> arenas;
  std::vector<int> missing;
  int64_t nbytes = 0;
  for (const int group : groups) {
    arenas.push_back(group_at(group).arena);
    if (arena_of(group).state == State::kLanded) continue;
    missing.push_back(group);
    nbytes += group_at(group).nbytes;
  }
  counters_.num_waits += static_cast<int64_t>(at_least - (groups.size() - missing.size()));
  awaited_.insert(awaited_.end(), missing.begin(), missing.end());
  schedule();
  const Range range("wait", nbytes);
  const Clock::time_point began = Clock::now();
  bool gives_up = false;
  while (must_await(groups, arenas, at_least) && !is_over() && !gives_up) {
    gives_up = wait_for_news(lock);
  }
  for (const int group : missing) awaited_.erase(std::ranges::find(awaited_, group));
  counters_.stall_ns += since_ns(began);
  check_usable();
  if (gives_up) fail("Interrupted", "interrupted while waiting for ", missing.size(), " groups");
  for (size_t i = 0; i < groups.size(); ++i) {
    if (is_placed(groups[i]) && group_at(groups[i]).arena == arenas[i]) continue;
    fail("ThreadConflict",
         "One streamed model runs in one thread at a time; another thread took the arena of group ",
         groups[i], ", for which this one waits. Serialise the calls.");
  }
  fail_placed(groups);
}

// False, too, when one has failed, or stands where it was not asked for.
bool Engine::must_await(const std::vector<int>& groups, const std::vector<int>& arenas,
                        size_t at_least) const {
  size_t num_landed = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    const Arena& arena = arena_of(groups[i]);
    if (!is_placed(groups[i]) || group_at(groups[i]).arena != arenas[i]) return false;
    if (arena.state == State::kFailed) return false;
    num_landed += arena.state == State::kLanded;
  }
  return num_landed < at_least;
}

// A failure is told once: then the group is not placed any more.
void Engine::fail_placed(const std::vector<int>& groups) {
  for (const int group : groups) {
    Arena& arena = arena_of(group);
    if (!is_placed(group) || arena.state != State::kFailed) continue;
    const std::string error = arena.error;
    // Nobody was given what stands there: nobody's stream matters.
    vacate(arena, Lane());
    throw std::runtime_error(error);
  }
}

// The group is there, or on its way with nobody's help: the caller's stream waits for it. Once it
// is known to be there, no stream needs to any more.
void Engine::take_placed(int group, Lane caller) {
  Arena& arena = arena_of(group);
  if (!arena.is_settled) arena.is_settled = device_->is_done(arena.ready);
  take(group, arena.memory.data, caller);
}

void Engine::evict(const std::vector<int>& groups) {
  const std::unique_lock lock = enter();
  for (const int group : groups) check_pooled(group);
  if (std::ranges::none_of(groups, [this](int group) { return is_placed(group); })) return;
  try {
    const Lane caller = device_->current();
    for (const int group : groups) {
      if (!is_placed(group)) continue;
      Arena& arena = arena_of(group);
      vacate(arena, caller);
      if (arena.is_view && options_.mode.trailing_drop) evicted_.push_back(group);
    }
  } catch (const DeviceLost& lost) {
    lose(lost.what());
    throw;
  }
  if (!evicted_.empty()) work_.notify_one();
}

void Engine::check_not_pooled(int group) const {
  if (!group_at(group).is_pooled) return;
  fail("EngineError", "Group ", group, " is pooled: place it in an arena and collect it.");
}

void Engine::check_pooled(int group) const {
  check_group(group);
  if (group_at(group).is_pooled) return;
  fail("EngineError", "Group ", group, " is not pooled: it has an arena; acquire it.");
}

// The group's pieces are cut for a place in a page, those of a view for its own pages.
void Engine::check_place(int group, int arena) const {
  check_pooled(group);
  if (!is_index(arena, arenas_.size()) || !arenas_[static_cast<size_t>(arena)].is_pool) {
    fail("EngineError", "A pooled group is placed in an arena that is no other group's own; got ",
         arena, " of ", arenas_.size(), " for group ", group, ".");
  }
  const Arena& to = arenas_[static_cast<size_t>(arena)];
  const Arena& home = arena_of(group);
  if ((to.is_view || home.is_view) && &to != &home) {
    fail("EngineError", "A view holds the group whose pages it is, and no other; got arena ", arena,
         " for group ", group, ".");
  }
  const uintptr_t phase = place_in_page(to.memory.data);
  const uintptr_t expected = place_in_page(home.memory.data);
  if (to.memory.nbytes < group_at(group).nbytes || phase != expected) {
    fail("EngineError", "A group is placed in arenas that it fits into and that begin at the same ",
         "place in a page; group ", group, " has ", group_at(group).nbytes, " bytes, ", expected,
         " bytes behind a page boundary, and arena ", arena, " has ", to.memory.nbytes, ", ", phase,
         " bytes behind one.");
  }
}

void Engine::check_placed(int group) const {
  check_pooled(group);
  if (is_placed(group)) return;
  fail("EngineError", "Only a placed group can be collected; group ", group,
       " was never placed, or since then it was evicted, its load failed, or its arena was given "
       "to another group. Place it.");
}

}  // namespace nexus
