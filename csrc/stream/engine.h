// The engine: moves groups from files into arenas ahead of the computation that reads them.
//
//   acquire(g)         the caller is about to read group g, and has finished with the one before
//        │ frees the arena of the group before, unless that is held; release(g) frees a held one
//        ▼
//   schedule()         the groups that come next, each into its own arena, in order of need
//        ▼
//   I/O thread         issue pieces ─▶ reader ─▶ complete ─▶ (copy) ─▶ landed ─▶ wakes acquire
//
// Pooled groups have no arena of their own, and nobody foresees them: the caller says which group
// goes into which arena, and when its bytes may leave it. See engine_pool.cpp.
//
//   place(g, a)        what stood in arena a is forgotten, g is on its way there
//   collect(g, ...)    which of them have landed; waits until so many have
//   evict(g)           arena of g is empty
//
// On a device a group has landed when its copies are enqueued: acquire makes the caller's stream
// wait for them, and not the caller. A group that stays in RAM is not read again: whoever gives it
// an arena enqueues its one copy, and no thread waits for another. See Note [Order on a device].
//
// Owns its files, its staging slots, its reader, its device and one thread. Arenas belong to the
// caller; the engine keeps them alive. It knows groups by number and files by bytes, and nothing
// else.
//
// Note [Arenas have generations]
// Every refill of an arena begins a new generation. A read carries the generation it was issued
// for; when it completes after the arena was given another task, it is dropped. Bytes of a new
// generation are requested only after the last read of an old one has come back, so an old read
// can never write over new bytes. acquire() remembers the generation it handed out and asserts, at
// the next acquire, that nobody refilled the arena while it was in use.
//
// Note [Clones]
// A compiler that functionalises may run acquire_ on a clone of the arena, and at the end of its
// graph write the clone's bytes back into the arena itself (aot_eager does). The op keeps its word:
// the memory it is given holds the group. But what stands in that arena afterwards is not ours, so
// an arena that was cloned once is never loaded ahead again, and never believed to hold anything.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "common/range.h"
#include "device/device.h"
#include "io/fault.h"
#include "io/file.h"
#include "io/ladder.h"
#include "io/reader_external.h"
#include "io/rows.h"
#include "io/staging.h"
#include "stream/load.h"
#include "stream/order.h"
#include "stream/pinned.h"

namespace nexus {

struct EngineOptions {
  ReadMode mode;
  FaultPlan faults;
  bool has_faults = false;
  bool poison = false;  // fill freed arenas with NaN bytes
  int num_slots = 0;    // of the staging ring; 0: half as many again as reads in flight
};

// Memory that holds one group at a time.
struct ArenaMemory {
  std::shared_ptr<void> owner;
  std::byte* data;
  int64_t nbytes;
};

// A group as the caller describes it; `extents` in the order of their group offsets.
struct GroupSpec {
  int arena;
  int64_t nbytes;
  bool is_brief;
  bool stays_in_ram;
  std::vector<Extent> extents;
  bool is_pooled = false;  // `arena` is any one that it may be placed in
};

// Bytes of a file.
struct Span {
  int file;
  int64_t offset;
  int64_t nbytes;
};

enum class Verify { kOff, kFirst, kAlways };

// A thread that calls, by a number that no other thread gets. What one thread began another may
// end: a backward pass may be over in another thread than it ran in.
using Caller = int64_t;
constexpr Caller kNobody = 0;
Caller this_caller();

class Engine {
 public:
  Engine(std::vector<std::unique_ptr<File>> files, std::unique_ptr<Device> device,
         EngineOptions options);
  // Waits for reads and copies in flight. Not for a forked child: the thread stayed in the parent.
  ~Engine();

  // Starts the thread and the first loads: residents (every group neither pooled nor in `order`),
  // then the first groups of `order`. Once only. Arenas that only pooled groups name, or nobody,
  // are the pool's.
  void attach(std::vector<ArenaMemory> arenas, const std::vector<GroupSpec>& groups,
              const std::vector<int>& order, int lookahead);
  // Digests by group; from here on landings are checked. What was read before, except the group
  // in use and what was collected, is read again.
  void set_digests(const std::vector<uint64_t>& digests, Verify verify);

  // Blocks until `group` stands in its arena, or is on its way there and the caller's stream waits
  // for it; frees the arena of the group acquired before.
  // When `arena` is another memory of the same size, the bytes are copied there; see Note [Clones].
  // Throws what went wrong with the read; the engine stays usable.
  void acquire(int group, std::byte* arena, int64_t nbytes, bool hold);
  // The readers of a held group are through. Does nothing for a group that is not held. Throws
  // ThreadConflict when another thread took the arena meanwhile.
  void release(int group);
  // Blocks until a resident group has landed; frees nothing.
  void wait_resident(int group);
  // Gives arenas[i] pooled group groups[i] to load, in turn; does not block. What stood there is
  // forgotten, and so is the arena where the group stood or was being loaded to; a load that is
  // under way there is dropped. What the caller's stream has enqueued so far is through with both.
  // Does nothing for a group that stands in that very arena, or is on its way there. Loads ahead
  // come after all others, until they are placed again as others.
  void place(const std::vector<int>& groups, const std::vector<int>& arenas, bool is_ahead);
  // Which of these placed groups have landed, in the order asked; the caller's stream waits for
  // their bytes. Blocks until `at_least` have; until then they are loaded before all others. Throws
  // what went wrong with a load, whose group is then not placed any more, and ThreadConflict when
  // another thread took an arena meanwhile.
  std::vector<int> collect(const std::vector<int>& groups, int64_t at_least);
  // Their bytes may go, when the caller's stream has come this far. Does nothing for a group that
  // is not placed.
  void evict(const std::vector<int>& groups);
  // `caller` is done with the last group it acquired: another thread may begin. Throws
  // ThreadConflict when another thread broke into the pass, whose result is then worthless.
  void end_pass(Caller caller);

  // Reads a group past the engine and hashes it: the reference that landings are compared with.
  uint64_t digest_of(int group) const;
  // Rows of a table in a file, past the arenas; see RowReader.
  void read_rows(int file, const Table& table, std::span<const int64_t> rows, std::byte* out);
  // Of files that still arrive; see io/arrived.h. Loads and rows wait for what is not there.
  // These bytes are.
  void announce(const std::vector<Span>& spans);
  // A whole file is, it is the right one, and was last written to then.
  void settle(int file, int64_t mtime_ns);
  // No more bytes will come: whoever needs one that is missing fails with `why`.
  void end_arrival(const std::string& why);
  // What came was wrong: every later call throws `why`.
  void refuse(const std::string& why);
  // Brings every mapped page in, in the background or not.
  void prefault(bool background);
  // Bytes of a mapped file where they are, kept mapped as long as somebody holds them.
  std::shared_ptr<std::byte> map(int file, int64_t offset, int64_t nbytes) const;

  // False in a forked child.
  bool is_in_this_process() const;

  std::string stats() const;
  // Of mode "gds": who serves the reads into device memory asks here. Null in other modes.
  std::shared_ptr<ExternalReader> external() const { return external_; }
  // Every later call throws EngineClosed; callers that wait now are woken with it.
  void close();

 private:
  friend class Explorer;  // tests/simcuda: walks through every interleaving

  enum class State { kEmpty, kLoading, kLanded, kFailed };

  struct Arena {
    ArenaMemory memory;
    bool is_view = false;                         // lies in a file's mapping
    bool is_pool = false;                         // for pooled groups
    bool is_ahead = false;                        // what was placed here may wait
    bool is_cloned = false;                       // see Note [Clones]
    bool is_held = false;                         // in use until release()
    Caller holder = kNobody;                      // who holds it
    Caller robbed = kNobody;                      // who held it too long; see wait_for_holder
    std::optional<uint64_t> acquired_generation;  // none while nobody uses it
    State state = State::kEmpty;
    int group = -1;
    uint64_t generation = 0;
    std::shared_ptr<Load> load;
    int in_flight = 0;        // reads of this generation
    int stale_in_flight = 0;  // reads of earlier ones
    bool is_retry = false;    // second attempt after a digest that differed
    std::string error;
    Lane lane;                // its copies
    Event free;               // who used it last is through
    bool is_left = false;     // that is recorded, and nobody has waited for it yet
    Event ready;              // its last copy is done
    bool is_settled = false;  // `ready` is known to have happened
  };

  // A place in the reader's queue, with the staging slot of the same number.
  struct Chunk {
    Request request;
    bool is_reading = false;
    bool holds_bytes = false;  // the slot is all there is until they are hashed
    Event copied;              // out of the slot
    AsyncRange range;          // of the read
    int arena = -1;
    int group = -1;
    uint64_t generation = 0;
    std::shared_ptr<Load> load;
    size_t piece = 0;
    bool was_direct = false;
    int64_t num_read = 0;  // from the window's start
    int64_t reached = 0;   // the most that num_read has been
    int attempts = 0;
  };

  struct Counters {
    int64_t bytes_read = 0, bytes_direct = 0, bytes_staged = 0;
    int64_t num_reads = 0, num_short_reads = 0, num_retries = 0, num_stale_reads = 0;
    int64_t num_loads = 0, num_landed = 0, num_failed = 0;
    int64_t num_hits = 0, num_waits = 0, num_mispredicted = 0, num_resident_hits = 0;
    int64_t num_verified = 0, num_healed = 0, num_dropped = 0, num_cloned = 0;
    int64_t num_copies = 0, bytes_copied = 0, num_ram_loads = 0, num_blocks = 0;
    int64_t stall_ns = 0, busy_ns = 0;
  };

  // Caller's side. The way in takes the mutex, all others expect it.
  std::unique_lock<std::mutex> enter() const;
  void check_usable() const;
  void check_thread(int group);
  void check_not_taken_over(Caller caller);
  void wait_for_holder(std::unique_lock<std::mutex>& lock, int group);
  void check_group(int group) const;
  void check_arena(int group, int64_t nbytes) const;
  void check_spec(const GroupSpec& spec, const std::vector<ArenaMemory>& arenas) const;
  void add_arena(ArenaMemory memory, bool is_pool);
  Lane make_pool_lane();
  void add_group(const GroupSpec& spec);
  void cut_group(Group& group);
  void make_ring();
  void make_external();
  bool needs_order(int group, const std::byte* arena) const;
  void await_rows(std::unique_lock<std::mutex>& lock, const File& file, const Table& table,
                  std::span<const int64_t> rows);
  void ask(std::unique_lock<std::mutex>& lock, int group, const std::byte* arena, Lane caller);
  void distrust_clone(Arena& arena, const Group& group);
  void open_reader();
  void follow(int group);
  void release_current(int next, Lane caller);
  void end_use();
  void free_arena(Arena& arena, int group, Lane caller);
  bool expect(int group);
  bool wait_for_news(std::unique_lock<std::mutex>& lock);
  void await(std::unique_lock<std::mutex>& lock, int group);
  void take(int group, std::byte* arena, Lane caller);
  void schedule();
  void want(int group);
  void want_placed(bool is_ahead);
  void enqueue(size_t arena_index);
  void begin_generation(Arena& arena);
  void begin(Arena& arena, int group);
  void accept(Arena& arena);
  bool lands_on_device(const Group& group) const;
  void copy_to_device(Arena& arena, const std::byte* host, int64_t offset, int64_t nbytes);
  void fail_load(Arena& arena, const std::runtime_error& error);
  void lose(const std::string& why);

  // Of pooled groups; engine_pool.cpp.
  void check_not_pooled(int group) const;
  void check_pooled(int group) const;
  void check_place(int group, int arena) const;
  void check_placed(int group) const;
  void place_one(int group, int arena, bool is_ahead, Lane caller);
  void vacate(Arena& arena, Lane caller);
  bool is_placed(int group) const { return arena_of(group).group == group; }
  std::vector<int> landed_of(const std::vector<int>& groups) const;
  void await_placed(std::unique_lock<std::mutex>& lock, const std::vector<int>& groups,
                    size_t at_least);
  bool must_await(const std::vector<int>& groups, const std::vector<int>& arenas,
                  size_t at_least) const;
  void fail_placed(const std::vector<int>& groups);
  void take_placed(int group, Lane caller);

  Group& group_at(int group) { return groups_[static_cast<size_t>(group)]; }
  const Group& group_at(int group) const { return groups_[static_cast<size_t>(group)]; }
  size_t index_of(const Arena& arena) const { return static_cast<size_t>(&arena - arenas_.data()); }
  const Arena& arena_of(int group) const {
    return arenas_[static_cast<size_t>(group_at(group).arena)];
  }
  Arena& arena_of(int group) { return arenas_[static_cast<size_t>(group_at(group).arena)]; }

  // I/O thread's side. All expect the mutex; those that take the lock open it for the long part.
  enum class Turn { kWorked, kIdle, kOver };
  void run();
  Turn turn(std::unique_lock<std::mutex>& lock);
  void issue();
  bool issue_next(size_t arena_index);
  bool has_arrived(size_t arena_index);
  Chunk* find_chunk();
  void run_errand(Arena& arena, std::unique_lock<std::mutex>& lock);
  void make_ram_copy(Arena& arena, std::unique_lock<std::mutex>& lock);
  void take_completion(std::unique_lock<std::mutex>& lock);
  void start(Chunk& chunk);
  void complete(Chunk& chunk, std::unique_lock<std::mutex>& lock);
  bool must_continue(Chunk& chunk, std::string& error);
  void land_piece(Chunk& chunk, std::unique_lock<std::mutex>& lock);
  void land_group(Arena& arena, std::unique_lock<std::mutex>& lock);
  uint64_t digest_of_load(const Arena& arena, const Group& group, const Load& load) const;
  bool is_current(const Chunk& chunk) const;
  void distrust(Arena& arena);
  void drop_left_behind(std::unique_lock<std::mutex>& lock);
  bool drop_evicted(std::unique_lock<std::mutex>& lock);
  void drop_pages(const Group& group) const;
  const Piece& piece_of(const Chunk& chunk) const;
  std::byte* host_landing_of(const Chunk& chunk) const;
  std::byte* window_of(const Chunk& chunk) const;
  bool is_over() const { return is_closing_ || !lost_.empty(); }

  const int process_;
  std::vector<std::unique_ptr<File>> files_;
  EngineOptions options_;
  Rung rung_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Staging> staging_;
  std::unique_ptr<PinnedLock> staging_lock_;
  std::string pin_refusal_;  // why memory that should be is not page-locked
  int64_t ram_bytes_ = 0;    // of groups that stay in RAM
  std::shared_ptr<ExternalReader> external_;
  std::unique_ptr<RowReader> rows_;  // made when the first row is asked for
  FaultCounts fault_counts_;

  mutable std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable landed_;
  std::vector<Group> groups_;
  std::vector<Arena> arenas_;
  std::vector<Lane> pool_lanes_;
  Order order_;
  int lookahead_ = 0;
  Verify verify_ = Verify::kOff;
  std::vector<Chunk> chunks_;
  std::vector<int> awaited_;      // by threads in await()
  std::vector<int> residents_;    // not yet known to have landed
  std::vector<size_t> queue_;     // arenas with pieces to issue, in order of need
  std::vector<uint64_t> claims_;  // by arena: the schedule() that last spoke for it
  uint64_t num_schedules_ = 0;
  std::vector<size_t> placed_;    // of the pool, arenas that may be loading, in order of placing
  std::vector<int> left_behind_;  // views whose pages are to be dropped
  std::vector<int> evicted_;      // the same, at once
  int num_in_flight_ = 0;
  int current_ = -1;        // the group last acquired
  bool has_begun_ = false;  // something streamed was acquired
  std::vector<int> ahead_;  // what schedule() expects, kept for its memory
  Caller owner_ = kNobody;
  // Whose pass another thread broke into, and whether it went on to do so.
  Caller contested_ = kNobody;
  bool was_taken_over_ = false;
  Counters counters_;
  bool is_closing_ = false;
  std::string lost_;                 // why the device can do nothing any more
  std::optional<Event> blocked_on_;  // what keeps the next read from starting
  std::optional<size_t> errand_;     // the arena whose load needs more than a read
  std::string no_more_;              // why what has not arrived never will; empty while it may
  std::optional<size_t> stranded_;   // the arena whose load needs such bytes
  size_t next_chunk_ = 0;
  std::thread thread_;

  std::thread prefault_thread_;
  volatile bool cancel_prefault_ = false;
  std::atomic<int64_t> prefault_ns_ = 0;
  std::atomic<int64_t> prefault_bytes_ = 0;
};

// Asked while a caller waits; true means "give up now" (Ctrl-C). Set once by library.cpp.
extern bool (*interrupted)();

}  // namespace nexus
