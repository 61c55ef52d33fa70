// The caller's side of the engine: acquire, release, and what to load next.
#include "stream/engine.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <utility>

#include "common/bounds.h"
#include "common/clock.h"
#include "common/error.h"
#include "common/unlocked.h"

namespace nexus {
namespace {

// How often a waiting caller looks for Ctrl-C.
constexpr std::chrono::milliseconds kInterruptPoll{50};

// A thread that holds a group this long, while another one waits for it, may be gone for good.
constexpr std::chrono::seconds kHoldPatience{10};

constexpr const char* kOneThread =
    "One streamed model runs in one thread at a time; another thread began a pass in the middle of "
    "this one, whose weights may have been overwritten. Serialise the calls.";

bool never_interrupted() { return false; }

}  // namespace

bool (*interrupted)() = &never_interrupted;

Caller this_caller() {
  static std::atomic<Caller> num_callers = 0;
  thread_local const Caller caller = ++num_callers;
  return caller;
}

void Engine::acquire(int group, std::byte* arena, int64_t nbytes, bool hold) {
  std::unique_lock lock = enter();
  check_group(group);
  check_not_pooled(group);
  check_arena(group, nbytes);
  try {
    const Lane caller = needs_order(group, arena) ? device_->current() : Lane();
    ask(lock, group, arena, caller);
    Arena& home = arena_of(group);
    // Readers of what was held here are ordered before this call: both say that they use the arena.
    // It is held while the bytes come, too: another thread would give it another group meanwhile.
    home.is_held = hold && group_at(group).is_streamed;
    home.holder = this_caller();
    try {
      await(lock, group);
      take(group, arena, caller);
    } catch (...) {
      home.is_held = false;
      throw;
    }
  } catch (const DeviceLost& lost) {
    lose(lost.what());
    throw;
  }
}

// What stays, and is there, may be read at any time: while a CUDA graph is captured, too.
bool Engine::needs_order(int group, const std::byte* arena) const {
  const Group& wanted = group_at(group);
  const Arena& home = arenas_[static_cast<size_t>(wanted.arena)];
  const bool ends_use = current_ >= 0 && group_at(current_).is_streamed;
  return wanted.is_streamed || !home.is_settled || arena != home.memory.data || ends_use;
}

// The caller goes on to this group.
void Engine::ask(std::unique_lock<std::mutex>& lock, int group, const std::byte* arena,
                 Lane caller) {
  const bool is_streamed = group_at(group).is_streamed;
  if (is_streamed) wait_for_holder(lock, group);
  if (!group_at(group).is_brief) {
    check_thread(group);
    release_current(group, caller);
    current_ = group;
  }
  if (is_streamed) follow(group);
  Arena& home = arena_of(group);
  if (arena != home.memory.data) distrust_clone(home, group_at(group));
  // What a graph has written back is overwritten, and not the other way round.
  if (home.is_cloned) {
    device_->wait(caller, home.free);
    device_->record(home.free, caller);
  }
  home.acquired_generation.reset();
}

// The group is there, or on its way with nobody's help: the caller's stream waits for it.
void Engine::take(int group, std::byte* arena, Lane caller) {
  Arena& home = arena_of(group);
  if (!home.is_settled) device_->wait(caller, home.ready);
  // Found as it was left, perhaps by another stream: whose readers this one's `free` must cover.
  if (std::exchange(home.is_left, false)) device_->wait(caller, home.free);
  home.acquired_generation = home.generation;
  if (arena == home.memory.data) return;
  ++counters_.num_cloned;
  device_->copy_within(caller, arena, home.memory.data, group_at(group).nbytes);
}

// The order goes on with this group. ahead_ is what was expected when it was last looked at.
void Engine::follow(int group) {
  const bool is_next = !ahead_.empty() && ahead_.front() == group;
  if (!is_next && !(has_begun_ && order_.is_last(group))) ++counters_.num_mispredicted;
  has_begun_ = true;
  order_.visit(group);
}

void Engine::release(int group) {
  const std::unique_lock lock = enter();
  check_group(group);
  const Lane caller = group_at(group).is_streamed ? device_->current() : Lane();
  Arena& arena = arena_of(group);
  if (arena.robbed == this_caller()) {
    arena.robbed = kNobody;
    fail("ThreadConflict", kOneThread);
  }
  if (!group_at(group).is_streamed && current_ == group) current_ = -1;
  if (!arena.is_held || arena.group != group) return;
  arena.is_held = false;
  try {
    free_arena(arena, group, caller);
  } catch (const DeviceLost& lost) {
    lose(lost.what());
    throw;
  }
  if (current_ == group) current_ = -1;
  schedule();
  landed_.notify_all();
}

// See Note [Clones]. An arena of one group only gets back what it held.
void Engine::distrust_clone(Arena& arena, const Group& group) {
  if (!group.is_streamed || arena.is_view) return;
  arena.is_cloned = true;
  if (arena.state == State::kLanded) arena.state = State::kEmpty;
}

void Engine::wait_resident(int group) {
  std::unique_lock lock = enter();
  check_group(group);
  check_not_pooled(group);
  if (group_at(group).is_streamed) {
    fail("EngineError", "Only a resident group can be waited for; group ", group,
         " shares its arena, acquire it.");
  }
  await(lock, group);
  Arena& arena = arena_of(group);
  const uint64_t generation = arena.generation;
  {
    const Unlocked open(lock);
    device_->block(arena.ready);
  }
  arena.is_settled = arena.generation == generation;
}

void Engine::end_pass(Caller caller) {
  const std::unique_lock lock = enter();
  if (owner_ == caller) {
    owner_ = kNobody;
    end_use();
  }
  check_not_taken_over(caller);
}

bool Engine::is_in_this_process() const { return getpid() == process_; }

// In a forked child the mutex may be held by a thread that does not exist: look first, then lock.
std::unique_lock<std::mutex> Engine::enter() const {
  if (!is_in_this_process()) {
    fail("ForkedEngine",
         "An engine does not survive fork; this is a child process. Stream the model in the child, "
         "or start processes with the spawn method.");
  }
  std::unique_lock lock(mutex_);
  check_usable();
  return lock;
}

void Engine::check_usable() const {
  if (is_closing_) {
    fail("EngineClosed", "This model's engine was closed. Stream the model again to use it.");
  }
  if (!lost_.empty()) throw std::runtime_error(lost_);
}

void Engine::lose(const std::string& why) {
  if (lost_.empty()) lost_ = why;
  work_.notify_all();
  landed_.notify_all();
}

// Two threads inside one model would free each other's arenas. Who comes second is refused once,
// so that a thread that died in mid-pass does not lock the model; if it insists, the first is told.
// What is held needs no such care: it stays until it is released.
void Engine::check_thread(int group) {
  if (order_.declared().empty()) return;
  const Caller me = this_caller();
  const bool is_mid_pass = current_ >= 0 && current_ != static_cast<int>(groups_.size()) - 1 &&
                           !arena_of(current_).is_held;
  if (owner_ != kNobody && owner_ != me && is_mid_pass) {
    contested_ = std::exchange(owner_, kNobody);
    was_taken_over_ = false;
    fail("ThreadConflict",
         "One streamed model runs in one thread at a time; a second thread asked for a group while "
         "the first was in the middle of a pass. Serialise the calls, or stream one model per "
         "thread.");
  }
  if (contested_ == me && group_at(group).is_streamed) {
    // From the first group on it is a new pass, with nothing to lose.
    if (group == order_.declared().front()) was_taken_over_ = false;
    check_not_taken_over(me);
  }
  if (contested_ != me) was_taken_over_ = true;
  owner_ = me;
}

void Engine::check_not_taken_over(Caller caller) {
  if (contested_ != caller) return;
  contested_ = kNobody;
  if (was_taken_over_) fail("ThreadConflict", kOneThread);
}

// Another thread computes from the arena and says when it is through. One that never does (its
// graph died half-way) is given up after a while, and told if it comes back.
void Engine::wait_for_holder(std::unique_lock<std::mutex>& lock, int group) {
  Arena& arena = arena_of(group);
  const Caller me = this_caller();
  const Clock::time_point began = Clock::now();
  while (arena.is_held && arena.holder != me && !is_over()) {
    if (wait_for_news(lock)) fail("Interrupted", "interrupted while waiting for group ", group);
    if (Clock::now() - began < kHoldPatience) continue;
    arena.is_held = false;
    arena.robbed = arena.holder;
    if (current_ >= 0 && &arena_of(current_) == &arena) current_ = -1;
    fail("ThreadConflict",
         "One streamed model runs in one thread at a time; another thread has held the arena of "
         "group ",
         group, " for ", kHoldPatience.count(), " s. Serialise the calls; the next one takes it.");
  }
  check_usable();
}

void Engine::check_group(int group) const {
  if (!is_index(group, groups_.size())) {
    fail("EngineError", "A group id lies in [0, ", groups_.size(), "), got ", group, ".");
  }
}

// A group may know the whole arena that it shares, or its own part of it.
void Engine::check_arena(int group, int64_t nbytes) const {
  const int64_t own = group_at(group).nbytes;
  const int64_t whole = arenas_[static_cast<size_t>(group_at(group).arena)].memory.nbytes;
  if (nbytes != own && nbytes != whole) {
    fail("EngineError", "acquire_ takes the arena of group ", group, " (", whole,
         " bytes), or the group's part of it (", own, " bytes); got a tensor of ", nbytes,
         " bytes.");
  }
}

// Everything enqueued by the caller so far has finished with the arena of the group before.
void Engine::release_current(int next, Lane caller) {
  if (current_ < 0 || current_ == next) return;
  Arena& arena = arena_of(current_);
  if (!arena.is_held) free_arena(arena, current_, caller);
}

// All that the pass does with arenas is enqueued. They are refilled in the next one, which may run
// on a stream that knows nothing of this one; what that must wait for is known now. The last group
// itself stays: a backward pass begins with it. What was cloned a graph may have written back.
void Engine::end_use() {
  const bool is_last = current_ >= 0 && group_at(current_).is_streamed;
  try {
    for (Arena& arena : arenas_) {
      const bool is_used = is_last && &arena == &arena_of(current_);
      if (arena.is_held || !(arena.is_cloned || is_used)) continue;
      const Lane caller = device_->current();
      if (arena.is_cloned) device_->wait(caller, arena.free);
      device_->record(arena.free, caller);
      arena.is_left = true;
    }
  } catch (const DeviceLost& lost) {
    lose(lost.what());
    throw;
  }
}

// From here on the arena may be refilled, when the caller's stream has come this far.
void Engine::free_arena(Arena& arena, int group, Lane caller) {
  // A failed or interrupted acquire got nothing.
  if (!arena.acquired_generation) return;
  const uint64_t acquired = *std::exchange(arena.acquired_generation, std::nullopt);
  if (arena.generation != acquired) {
    fail("EngineError", "An arena was refilled while group ", group, " was in use (generation ",
         acquired, " became ", arena.generation,
         "). The output is wrong; this is a defect of nexus_ext, please report it.");
  }
  if (!group_at(group).is_streamed) return;
  if (!arena.is_left) device_->record(arena.free, caller);
  arena.is_left = true;
  if (options_.poison && !arena.is_view) {
    device_->wait(arena.lane, arena.free);
    device_->poison(arena.lane, arena.memory.data, arena.memory.nbytes);
    arena.state = State::kEmpty;
    arena.group = -1;
  }
  if (arena.is_cloned) arena.state = State::kEmpty;
  if (arena.is_view) {
    // Present pages cost a look; absent ones are read ahead again.
    arena.state = State::kEmpty;
    if (!arena.is_pool) left_behind_.push_back(group);
  }
}

// True when the group has landed; else its load is under way, before all others.
bool Engine::expect(int group) {
  Arena& arena = arena_of(group);
  const bool was_expected =
      arena.group == group && (arena.state == State::kLoading || arena.state == State::kLanded);
  if (!was_expected) begin(arena, group);
  // From RAM it is there at once.
  const bool is_there = arena.state == State::kLanded;
  if (is_there) ++(group_at(group).is_streamed ? counters_.num_hits : counters_.num_resident_hits);
  if (!is_there) awaited_.push_back(group);
  schedule();
  return is_there;
}

// Waits until something may have landed. True when the caller is to give up.
bool Engine::wait_for_news(std::unique_lock<std::mutex>& lock) {
  if (landed_.wait_for(lock, kInterruptPoll) != std::cv_status::timeout) return false;
  const Unlocked open(lock);
  return interrupted();
}

// Waits on the host until `group` has landed. Counts the time as stall.
void Engine::await(std::unique_lock<std::mutex>& lock, int group) {
  if (expect(group)) return;
  Arena& arena = arena_of(group);
  ++counters_.num_waits;
  const Range range("wait", group_at(group).nbytes);
  const Clock::time_point began = Clock::now();
  bool gives_up = false;
  while (arena.group == group && arena.state == State::kLoading && !is_over() && !gives_up) {
    gives_up = wait_for_news(lock);
  }
  awaited_.erase(std::find(awaited_.begin(), awaited_.end(), group));
  counters_.stall_ns += since_ns(began);
  check_usable();
  if (gives_up) fail("Interrupted", "interrupted while waiting for group ", group);
  if (arena.group != group) fail("ThreadConflict", kOneThread);
  // The arena stays failed: asking again reads again.
  if (arena.state == State::kFailed) throw std::runtime_error(arena.error);
}

// Most urgent first: the groups being waited for, the one in use, residents not yet read, what was
// placed, then the groups that come next, as far as their arenas are free, and what was placed
// ahead.
void Engine::schedule() {
  queue_.clear();
  ++num_schedules_;
  for (const int group : awaited_) want(group);
  if (current_ >= 0) want(current_);
  std::erase_if(residents_, [this](int group) { return arena_of(group).state == State::kLanded; });
  for (const int group : residents_) want(group);
  std::erase_if(placed_, [this](size_t i) { return arenas_[i].state != State::kLoading; });
  want_placed(false);
  if (has_begun_) {
    order_.predict(static_cast<size_t>(lookahead_), ahead_);
  } else {
    // Before the first pass every arena is free.
    ahead_ = order_.declared();
    ahead_.resize(std::min(ahead_.size(), static_cast<size_t>(lookahead_) + 1));
  }
  for (const int group : ahead_) want(group);
  want_placed(true);
  if (!queue_.empty() || !left_behind_.empty()) work_.notify_one();
}

// Puts a group into the queue unless its arena is spoken for: by the group in use, or by one that
// comes earlier. It is this claim, and not arithmetic on numbers, that keeps arenas apart.
void Engine::want(int group) {
  const auto index = static_cast<size_t>(group_at(group).arena);
  // Begun when it was placed, and never here: the arena may be another group's by now.
  if (group_at(group).is_pooled) {
    if (is_placed(group)) enqueue(index);
    return;
  }
  if (claims_[index] == num_schedules_) return;
  claims_[index] = num_schedules_;
  Arena& arena = arenas_[index];
  if (arena.is_held && arena.group != group) return;
  if (arena.is_cloned && std::ranges::find(awaited_, group) == awaited_.end()) return;
  // A group that failed is read again when it is asked for, and not before.
  const bool has_failed = arena.group == group && arena.state == State::kFailed;
  const bool is_there = arena.group == group && arena.state != State::kEmpty;
  if (!is_there && !has_failed) begin(arena, group);
  enqueue(index);
}

void Engine::want_placed(bool is_ahead) {
  for (const size_t index : placed_) {
    if (arenas_[index].is_ahead == is_ahead) enqueue(index);
  }
}

// Once more does no harm: the first place counts.
void Engine::enqueue(size_t arena_index) {
  const Arena& arena = arenas_[arena_index];
  if (arena.state == State::kLoading && arena.load->has_next()) queue_.push_back(arena_index);
}

// What was asked for until now is not for whoever comes.
void Engine::begin_generation(Arena& arena) {
  ++arena.generation;
  arena.stale_in_flight += std::exchange(arena.in_flight, 0);
}

// Gives the arena a new task. See Note [Arenas have generations].
void Engine::begin(Arena& arena, int group) {
  const Group& next = group_at(group);
  begin_generation(arena);
  arena.group = group;
  arena.state = State::kLoading;
  arena.is_retry = false;
  const bool is_hashed =
      next.digest.has_value() && (verify_ == Verify::kAlways || !next.is_verified);
  arena.load = std::make_shared<Load>(next, is_hashed && verify_ != Verify::kOff);
  arena.is_settled = false;
  ++counters_.num_loads;
  try {
    // Who had the arena before is through with it when its first byte is overwritten.
    device_->wait(arena.lane, arena.free);
    arena.is_left = false;
    // Reads that land there are in no lane: they begin when all that is in this one is done.
    if (lands_on_device(next)) device_->record(arena.free, arena.lane);
    const bool is_here = next.is_in_ram() && !arena.load->is_hashed();
    // No read will come back to say that it landed. One that still writes here comes back first.
    if (next.pieces.empty() || (is_here && arena.stale_in_flight == 0)) accept(arena);
  } catch (const Error& error) {
    fail_load(arena, error);
  }
}

bool Engine::lands_on_device(const Group& group) const {
  return !device_->is_host() && !group.stays_in_ram && rung_.io == "gds";
}

// Makes the group's bytes the arena's: from here on they may be acquired.
void Engine::accept(Arena& arena) {
  Group& group = group_at(arena.group);
  if (group.ram != nullptr) {
    counters_.num_ram_loads += group.ram->is_filled;
    group.ram->is_filled = true;
    for (int64_t offset = 0; offset < group.nbytes;) {
      const int64_t nbytes = std::min(group.nbytes - offset, group.ram->num_together(offset));
      copy_to_device(arena, group.ram->data() + offset, offset, nbytes);
      offset += nbytes;
    }
  }
  device_->record(arena.ready, arena.lane);
  arena.state = State::kLanded;
  ++counters_.num_landed;
  landed_.notify_all();
}

void Engine::copy_to_device(Arena& arena, const std::byte* host, int64_t offset, int64_t nbytes) {
  const Range range("copy", nbytes);
  ++counters_.num_copies;
  counters_.bytes_copied += nbytes;
  device_->copy(arena.lane, arena.memory.data + offset, host, nbytes);
}

void Engine::fail_load(Arena& arena, const std::runtime_error& error) {
  arena.state = State::kFailed;
  arena.error = error.what();
  ++counters_.num_failed;
  landed_.notify_all();
  if (dynamic_cast<const DeviceLost*>(&error) != nullptr) lose(error.what());
}

}  // namespace nexus
