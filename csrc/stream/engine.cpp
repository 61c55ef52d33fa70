// The caller's side of the engine: acquire, release, and what to load next.
#include "stream/engine.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <limits>
#include <set>
#include <utility>

#include "common/error.h"
#include "common/json.h"
#include "common/unlocked.h"
#include "io/page_cache.h"
#include "io/reader_split.h"

namespace nexus {
namespace {

using Clock = std::chrono::steady_clock;

int64_t since_ns(Clock::time_point begin) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
}

// How often a waiting caller looks for Ctrl-C.
constexpr std::chrono::milliseconds kInterruptPoll{50};

// A thread that holds a group this long, while another one waits for it, may be gone for good.
constexpr std::chrono::seconds kHoldPatience{10};

// Rows are small and far apart: a disk serves this many seeks at once nearly as fast as one.
constexpr int kRowDepth = 8;

constexpr const char* kOneThread =
    "One streamed model runs in one thread at a time; another thread began a pass in the middle of "
    "this one, whose weights may have been overwritten. Serialise the calls.";

// What a disk that writes into a device's memory wants: pages of the file. Where their place on the
// device begins in mid-page it is slower, and as right.
constexpr Alignment kDeviceAlignment = {.memory = 1, .offset = 4096};

// One that is read into, one that is copied from, one that is waited for.
constexpr int kFewestSlots = 3;

// Half as many slots again as reads in flight: while one answer is copied out, the queue stays
// full.
int num_slots(int depth) { return depth + depth / 2; }

bool never_interrupted() { return false; }

bool is_index(int index, size_t count) { return index >= 0 && index < static_cast<int>(count); }

// Whether [offset, offset + nbytes) lies in [0, size), without overflow.
bool is_range(int64_t offset, int64_t nbytes, int64_t size) {
  return offset >= 0 && nbytes >= 0 && nbytes <= size && offset <= size - nbytes;
}

void check_order(const std::vector<int>& order, size_t num_groups) {
  std::set<int> seen;
  for (const int group : order) {
    if (!is_index(group, num_groups) || !seen.insert(group).second) {
      fail("EngineError", "The order names groups in [0, ", num_groups, "), each once; got ", group,
           ".");
    }
  }
}

bool lies_in(const std::byte* data, const File& file) {
  return file.mapping() != nullptr && data >= file.mapping() && data < file.mapping() + file.size();
}

}  // namespace

bool (*interrupted)() = &never_interrupted;

Caller this_caller() {
  static std::atomic<Caller> num_callers = 0;
  thread_local const Caller caller = ++num_callers;
  return caller;
}

Engine::Engine(std::vector<std::unique_ptr<File>> files, std::unique_ptr<Device> device,
               EngineOptions options)
    : process_(getpid()),
      files_(std::move(files)),
      options_(std::move(options)),
      device_(std::move(device)) {
  rung_ = prepare_files(files_, options_.mode);
  if (rung_.io == "gds" && device_->is_host()) {
    fail("ConfigError",
         "io=\"gds\" reads into the memory of a GPU; the device is \"cpu\". Use io=\"direct\".");
  }
}

Engine::~Engine() { close(); }

void Engine::attach(std::vector<ArenaMemory> arenas, const std::vector<GroupSpec>& groups,
                    const std::vector<int>& order, int lookahead) {
  const std::unique_lock lock = enter();
  if (!arenas_.empty()) fail("EngineError", "An engine is attached once; open another one.");
  for (const GroupSpec& spec : groups) check_spec(spec, arenas);
  check_order(order, groups.size());
  for (ArenaMemory& memory : arenas) {
    Arena& arena = arenas_.emplace_back();
    arena.memory = std::move(memory);
    arena.is_view = std::any_of(files_.begin(), files_.end(), [&](const auto& file) {
      return lies_in(arena.memory.data, *file);
    });
    if (!arena.is_view) device_->prepare(arena.memory.data, arena.memory.nbytes);
    arena.lane = device_->make_lane();
    arena.ready = device_->make_event();
    arena.free = device_->make_event();
    // An allocator gives out memory that work enqueued earlier may still read.
    device_->record(arena.free, device_->current());
  }
  for (const GroupSpec& spec : groups) add_group(spec);
  order_ = Order(order);
  lookahead_ = lookahead;
  claims_.resize(arenas_.size());
  for (const int group : order) group_at(group).is_streamed = true;
  for (int i = 0; i < static_cast<int>(groups_.size()); ++i) {
    if (!group_at(i).is_streamed) residents_.push_back(i);
  }
  open_reader();
  schedule();
  thread_ = std::thread([this] { run(); });
}

// Reads go where a group says: outside its arena they would overwrite anything.
void Engine::check_spec(const GroupSpec& spec, const std::vector<ArenaMemory>& arenas) const {
  if (!is_index(spec.arena, arenas.size()) || spec.nbytes < 0 ||
      spec.nbytes > arenas[static_cast<size_t>(spec.arena)].nbytes) {
    fail("EngineError", "A group must fit into an arena that exists; got arena ", spec.arena,
         " of ", arenas.size(), " for ", spec.nbytes, " bytes.");
  }
  for (const Extent& extent : spec.extents) {
    if (!is_index(extent.file, files_.size()) ||
        !is_range(extent.offset, extent.nbytes, std::numeric_limits<int64_t>::max()) ||
        !is_range(extent.group_offset, extent.nbytes, spec.nbytes)) {
      fail("EngineError", "An extent must lie in a file and in its group; got file ", extent.file,
           " of ", files_.size(), ", ", extent.nbytes, " bytes at offset ", extent.offset,
           ", at byte ", extent.group_offset, " of a group of ", spec.nbytes, ".");
    }
  }
}

void Engine::add_group(const GroupSpec& spec) {
  Group& group = groups_.emplace_back();
  group.arena = spec.arena;
  group.nbytes = spec.nbytes;
  group.is_brief = spec.is_brief;
  group.stays_in_ram = spec.stays_in_ram && !device_->is_host();
  group.extents = spec.extents;
  cut_group(group);
}

// Cuts the group's extents for the place where its reads will land.
void Engine::cut_group(Group& group) {
  const std::byte* landing = arenas_[static_cast<size_t>(group.arena)].memory.data;
  if (group.stays_in_ram) {
    // Only its place in a page matters, and that is known before the memory is.
    landing = reinterpret_cast<const std::byte*>(group.ram_phase());
  } else if (!device_->is_host() && rung_.io != "gds") {
    landing = nullptr;
  }
  group.pieces.clear();
  group.files.clear();
  for (const Extent& extent : group.extents) {
    const File& file = *files_[static_cast<size_t>(extent.file)];
    const Alignment& alignment = lands_on_device(group) ? kDeviceAlignment : file.alignment();
    cut(extent, landing, alignment, options_.mode.chunk_bytes, group.pieces);
    if (std::find(group.files.begin(), group.files.end(), extent.file) == group.files.end()) {
      group.files.push_back(extent.file);
    }
  }
}

void Engine::open_reader() {
  const bool is_staged = std::any_of(groups_.begin(), groups_.end(), [](const Group& group) {
    return std::any_of(group.pieces.begin(), group.pieces.end(),
                       [](const Piece& piece) { return piece.staged; });
  });
  Buffers buffers;
  for (const int group : order_.declared()) {
    if (!device_->is_host()) break;
    Arena& arena = arena_of(group);
    const std::span<std::byte> memory(arena.memory.data, static_cast<size_t>(arena.memory.nbytes));
    if (std::none_of(buffers.begin(), buffers.end(),
                     [&](const auto& known) { return known.data() == memory.data(); })) {
      buffers.push_back(memory);
    }
  }
  // A group that finds no room in RAM after all is staged like the others.
  if (is_staged || !device_->is_host()) {
    make_ring();
    buffers.push_back(staging_->memory());
  }
  make_reader(rung_, options_.mode, buffers);
  if (rung_.io == "gds") make_external();
  if (options_.has_faults) {
    rung_.reader = make_faulty_reader(std::move(rung_.reader), options_.faults, &fault_counts_);
  }
  chunks_.resize(static_cast<size_t>(num_slots(rung_.reader->depth())));
  if (staging_ != nullptr) {
    chunks_.resize(std::min(chunks_.size(), static_cast<size_t>(staging_->num_slots())));
  }
  for (Chunk& chunk : chunks_) chunk.copied = device_->make_event();
}

// What lands on the device is read by somebody else, the rest as ever.
void Engine::make_external() {
  std::vector<const File*> files;
  for (const auto& file : files_) files.push_back(file.get());
  external_ = std::make_shared<ExternalReader>(rung_.reader->depth(), "gds", std::move(files));
  rung_.reader =
      make_split_reader(std::move(rung_.reader), external_, [this](const std::byte* buffer) {
        return std::ranges::any_of(arenas_, [buffer](const Arena& arena) {
          const std::byte* begin = arena.memory.data;
          return std::less_equal<>()(begin, buffer) &&
                 std::less<>()(buffer, begin + arena.memory.nbytes);
        });
      });
}

// As large as it was asked for, if the device takes it; else smaller, else not page-locked: slower,
// but never an error.
void Engine::make_ring() {
  int64_t largest_slot = slot_bytes(kDeviceAlignment, options_.mode.chunk_bytes);
  for (const auto& file : files_) {
    largest_slot = std::max(largest_slot, slot_bytes(file->alignment(), options_.mode.chunk_bytes));
  }
  const int depth = options_.mode.depth > 0 ? options_.mode.depth : kLargestDefaultDepth;
  const int wanted = options_.num_slots > 0 ? options_.num_slots : num_slots(depth);
  for (int count = wanted; count >= kFewestSlots; count /= 2) {
    staging_ = std::make_unique<Staging>(count, largest_slot);
    try {
      staging_lock_ =
          std::make_unique<PinnedLock>(*device_, staging_->memory(), staging_->stride());
      return;
    } catch (const DeviceLost&) {
      throw;
    } catch (const Error& refused) {
      pin_refusal_ = refused.what();
    }
  }
  staging_ = std::make_unique<Staging>(wanted, largest_slot);
}

void Engine::set_digests(const std::vector<uint64_t>& digests, Verify verify) {
  const std::unique_lock lock = enter();
  if (digests.size() != groups_.size()) {
    fail("EngineError", "Every group needs its digest; got ", digests.size(), " for ",
         groups_.size(), " groups.");
  }
  for (size_t i = 0; i < digests.size(); ++i) {
    groups_[i].digest = digests[i];
    groups_[i].is_verified = false;
  }
  verify_ = verify;
  if (verify_ == Verify::kOff) return;
  // What landed unseen is not trusted, except where somebody computes with it now.
  for (Arena& arena : arenas_) {
    if (arena.group < 0 || arena.acquired_generation) continue;
    if (!group_at(arena.group).is_streamed) residents_.push_back(arena.group);
    begin(arena, arena.group);
  }
  schedule();
}

void Engine::acquire(int group, std::byte* arena, int64_t nbytes, bool hold) {
  std::unique_lock lock = enter();
  check_group(group);
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
  if (home.is_cloned) device_->record(home.free, caller);
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
  const Lane caller = device_->current();
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
    if (landed_.wait_for(lock, kInterruptPoll) != std::cv_status::timeout) continue;
    lock.unlock();
    const bool gives_up = interrupted();
    lock.lock();
    if (gives_up) fail("Interrupted", "interrupted while waiting for group ", group);
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

// The readers of the group acquired last are all enqueued. It is freed by the next pass, which may
// run on a stream that knows nothing of this one; what it waits for is known now. The group itself
// stays: a backward pass begins with it.
void Engine::end_use() {
  if (current_ < 0 || !group_at(current_).is_streamed || arena_of(current_).is_held) return;
  Arena& arena = arena_of(current_);
  try {
    device_->record(arena.free, device_->current());
    arena.is_left = true;
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
    left_behind_.push_back(group);
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

// Waits on the host until `group` has landed. Counts the time as stall.
void Engine::await(std::unique_lock<std::mutex>& lock, int group) {
  if (expect(group)) return;
  Arena& arena = arena_of(group);
  ++counters_.num_waits;
  const Range range("wait", group_at(group).nbytes);
  const Clock::time_point began = Clock::now();
  bool gives_up = false;
  while (arena.group == group && arena.state == State::kLoading && !is_over() && !gives_up) {
    if (landed_.wait_for(lock, kInterruptPoll) != std::cv_status::timeout) continue;
    lock.unlock();
    gives_up = interrupted();
    lock.lock();
  }
  awaited_.erase(std::find(awaited_.begin(), awaited_.end(), group));
  counters_.stall_ns += since_ns(began);
  check_usable();
  if (gives_up) fail("Interrupted", "interrupted while waiting for group ", group);
  if (arena.group != group) fail("ThreadConflict", kOneThread);
  // The arena stays failed: asking again reads again.
  if (arena.state == State::kFailed) throw std::runtime_error(arena.error);
}

// Most urgent first: the groups being waited for, the one in use, residents not yet read, then the
// groups that come next, as far as their arenas are free.
void Engine::schedule() {
  queue_.clear();
  ++num_schedules_;
  for (const int group : awaited_) want(group);
  if (current_ >= 0) want(current_);
  std::erase_if(residents_, [this](int group) { return arena_of(group).state == State::kLanded; });
  for (const int group : residents_) want(group);
  if (has_begun_) {
    order_.predict(static_cast<size_t>(lookahead_), ahead_);
  } else {
    // Before the first pass every arena is free.
    ahead_ = order_.declared();
    ahead_.resize(std::min(ahead_.size(), static_cast<size_t>(lookahead_) + 1));
  }
  for (const int group : ahead_) want(group);
  if (!queue_.empty() || !left_behind_.empty()) work_.notify_one();
}

// Puts a group into the queue unless its arena is spoken for: by the group in use, or by one that
// comes earlier. It is this claim, and not arithmetic on numbers, that keeps arenas apart.
void Engine::want(int group) {
  const auto index = static_cast<size_t>(group_at(group).arena);
  if (claims_[index] == num_schedules_) return;
  claims_[index] = num_schedules_;
  Arena& arena = arenas_[index];
  if (arena.is_held && arena.group != group) return;
  if (arena.is_cloned && std::ranges::find(awaited_, group) == awaited_.end()) return;
  // A group that failed is read again when it is asked for, and not before.
  const bool has_failed = arena.group == group && arena.state == State::kFailed;
  const bool is_there = arena.group == group && arena.state != State::kEmpty;
  if (!is_there && !has_failed) begin(arena, group);
  if (arena.state == State::kLoading && arena.load->has_next()) queue_.push_back(index);
}

// Gives the arena a new task. See Note [Arenas have generations].
void Engine::begin(Arena& arena, int group) {
  const Group& next = group_at(group);
  ++arena.generation;
  arena.stale_in_flight += std::exchange(arena.in_flight, 0);
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

uint64_t Engine::digest_of(int group) const {
  {
    const std::unique_lock lock = enter();
    check_group(group);
  }
  Xxh3 hash;
  std::vector<std::byte> buffer(static_cast<size_t>(options_.mode.chunk_bytes));
  for (const Piece& piece : group_at(group).pieces) {
    const File& file = *files_[static_cast<size_t>(piece.file)];
    for (int64_t done = 0; done < piece.nbytes;) {
      const ssize_t count = pread(file.buffered_descriptor(), buffer.data(),
                                  static_cast<size_t>(piece.nbytes - done), piece.offset + done);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) {
        fail(count < 0 ? "ReadError" : "TruncatedCheckpoint", "Cannot read ", file.path(),
             " at offset ", piece.offset + done,
             " for its digest: ", count < 0 ? std::strerror(errno) : "the file ends there", ".");
      }
      hash.update(buffer.data(), static_cast<size_t>(count));
      done += count;
    }
    file.drop(piece.offset, piece.nbytes);
  }
  return hash.digest();
}

void Engine::read_rows(int file, const Table& table, std::span<const int64_t> rows,
                       std::byte* out) {
  {
    const std::unique_lock lock = enter();
    if (!is_index(file, files_.size()) || table.row_bytes <= 0 || table.num_rows < 0 ||
        table.num_rows > std::numeric_limits<int64_t>::max() / table.row_bytes ||
        !is_range(table.offset, table.num_rows * table.row_bytes,
                  files_[static_cast<size_t>(file)]->size())) {
      fail("EngineError", "A table lies inside a file; got ", table.num_rows, " rows of ",
           table.row_bytes, " bytes at offset ", table.offset, " of file ", file, " of ",
           files_.size(), ".");
    }
    if (rows_ == nullptr) {
      auto reader = make_threads_reader(kRowDepth, options_.mode.trailing_drop);
      if (options_.has_faults) {
        reader = make_faulty_reader(std::move(reader), options_.faults, &fault_counts_);
      }
      rows_ = std::make_unique<RowReader>(std::move(reader));
    }
  }
  rows_->read(*files_[static_cast<size_t>(file)], table, rows, out);
}

void Engine::prefault(bool background) {
  enter().unlock();
  if (prefault_thread_.joinable()) prefault_thread_.join();
  prefault_thread_ = std::thread([this] {
    const Clock::time_point began = Clock::now();
    const int num_threads = std::max(2u, std::thread::hardware_concurrency());
    for (const auto& file : files_) {
      if (file->mapping() == nullptr) continue;
      prefault_bytes_ +=
          populate_parallel(file->mapping(), file->size(), num_threads, &cancel_prefault_);
    }
    prefault_ns_ = since_ns(began);
  });
  if (!background) prefault_thread_.join();
}

std::shared_ptr<std::byte> Engine::map(int file, int64_t offset, int64_t nbytes) const {
  if (!is_index(file, files_.size()) || files_[static_cast<size_t>(file)]->mapping() == nullptr) {
    fail("EngineError", "Only files opened with io=\"mmap\" are mapped; got file ", file, " of ",
         files_.size(), ".");
  }
  const File& mapped = *files_[static_cast<size_t>(file)];
  if (!is_range(offset, nbytes, mapped.size())) {
    fail("EngineError", "A view lies inside its file; got ", nbytes, " bytes at offset ", offset,
         " of ", mapped.path(), " with ", mapped.size(), " bytes.");
  }
  return {mapped.shared_mapping(), mapped.mapping() + offset};
}

std::string Engine::stats() const {
  const std::unique_lock lock = enter();
  const Counters& c = counters_;
  // A file may have been refused direct reads after the start.
  std::string refusal = rung_.refusal;
  bool is_direct = rung_.io == "direct";
  for (const auto& file : files_) {
    if (is_direct && !file->is_direct()) {
      is_direct = false;
      refusal = concat("O_DIRECT is refused for ", file->path(), ": ", file->refusal());
    }
  }
  const RowCounts rows = rows_ == nullptr ? RowCounts() : rows_->counts();
  JsonObject out;
  out.add("io_mode", rung_.io == "direct" && !is_direct ? "buffered" : rung_.io)
      .add("reader", rung_.reader == nullptr ? std::string() : rung_.reader->name())
      .add("refusal", refusal)
      .add("depth", static_cast<int64_t>(rung_.reader == nullptr ? 0 : rung_.reader->depth()))
      .add("chunk_bytes", options_.mode.chunk_bytes)
      .add("staging_bytes", staging_ == nullptr ? int64_t{0} : staging_->nbytes())
      .add("num_slots", static_cast<int64_t>(staging_ == nullptr ? 0 : staging_->num_slots()))
      .add("device", device_->name())
      .add("is_pinned", staging_lock_ != nullptr && !device_->is_host())
      .add("pin_refusal", pin_refusal_)
      .add("ram_bytes", ram_bytes_)
      .add("num_views", static_cast<int64_t>(std::count_if(arenas_.begin(), arenas_.end(),
                                                           [](auto& a) { return a.is_view; })))
      .add("bytes_read", c.bytes_read)
      .add("bytes_direct", c.bytes_direct)
      .add("bytes_staged", c.bytes_staged)
      .add("num_reads", c.num_reads)
      .add("num_short_reads", c.num_short_reads)
      .add("num_retries", c.num_retries)
      .add("num_in_flight", static_cast<int64_t>(num_in_flight_))
      .add("num_stale_reads", c.num_stale_reads)
      .add("num_loads", c.num_loads)
      .add("num_landed", c.num_landed)
      .add("num_failed", c.num_failed)
      .add("num_hits", c.num_hits)
      .add("num_resident_hits", c.num_resident_hits)
      .add("num_waits", c.num_waits)
      .add("num_mispredicted", c.num_mispredicted)
      .add("num_verified", c.num_verified)
      .add("num_healed", c.num_healed)
      .add("num_dropped", c.num_dropped)
      .add("num_cloned", c.num_cloned)
      .add("num_copies", c.num_copies)
      .add("bytes_copied", c.bytes_copied)
      .add("num_ram_loads", c.num_ram_loads)
      .add("num_blocks", c.num_blocks)
      .add("num_rows", rows.rows)
      .add("num_row_reads", rows.reads)
      .add("num_row_retries", rows.second)
      .add("row_bytes_read", rows.bytes)
      .add("stall_seconds", static_cast<double>(c.stall_ns) * 1e-9)
      .add("busy_seconds", static_cast<double>(c.busy_ns) * 1e-9)
      .add("prefault_bytes", prefault_bytes_.load())
      .add("prefault_seconds", static_cast<double>(prefault_ns_.load()) * 1e-9)
      .add("num_injected_errors", fault_counts_.errors.load())
      .add("num_injected_retries", fault_counts_.retries.load())
      .add("num_injected_shorts", fault_counts_.shorts.load())
      .add("num_injected_delays", fault_counts_.delays.load())
      .add("num_injected_flips", fault_counts_.flips.load())
      .add("num_injected_refusals", fault_counts_.refusals.load());
  return out.str();
}

void Engine::close() {
  {
    std::lock_guard lock(mutex_);
    is_closing_ = true;
    cancel_prefault_ = true;
  }
  work_.notify_all();
  landed_.notify_all();
  if (external_ != nullptr) external_->stop();
  if (thread_.joinable()) thread_.join();
  if (prefault_thread_.joinable()) prefault_thread_.join();
  // Arenas go back to their allocator, slots to the kernel: nothing may be on its way to either.
  device_->drain();
}

}  // namespace nexus
