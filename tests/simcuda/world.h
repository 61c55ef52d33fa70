// The simulated world: contexts, streams with a thread each, events, memory, and what a test has
// set. One mutex guards all of it; bytes are copied without it.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "abi.h"

namespace simcuda {

using Lock = std::unique_lock<std::mutex>;

constexpr int kMaxDevices = 16;

// -- memory ------------------------------------------------------------------------------------

// A registered range of host memory, or a declared range of device memory.
struct Range {
  uintptr_t begin = 0;
  int64_t nbytes = 0;
  int device = 0;       // whose context it belongs to
  int64_t pending = 0;  // operations that are queued or run
  int64_t busy = 0;     // threads that touch its bytes now
  bool gone = false;    // unregistered or forgotten: its bytes must not be touched again
};

using RangePtr = std::shared_ptr<Range>;
using Ranges = std::map<uintptr_t, RangePtr>;

struct Lookup {
  RangePtr range;      // the first that shares a byte with the memory asked for
  bool whole = false;  // and holds all of it
};

Lookup look_up(const Ranges& ranges, uintptr_t at, int64_t nbytes);

// -- streams and events ------------------------------------------------------------------------

// One record of an event: a moment in a stream. Later records of the event are other points.
struct Point {
  bool reached = false;
  std::string name;
};

using PointPtr = std::shared_ptr<Point>;

struct Op {
  enum class Kind { kCopy, kFill, kWait, kRecord, kDelay };
  Kind kind = Kind::kDelay;
  uintptr_t to = 0;
  uintptr_t from = 0;
  int64_t nbytes = 0;
  unsigned char value = 0;        // kFill
  RangePtr to_range = nullptr;    // null: memory nobody keeps track of
  RangePtr from_range = nullptr;  // the same
  std::shared_ptr<std::vector<unsigned char>> staged =
      nullptr;                 // pageable source, read at the call
  CUresult breaks = kSuccess;  // the context is lost when it executes
  PointPtr point = nullptr;    // kWait, kRecord
  int64_t delay_us = 0;        // kDelay
};

// Drawn for each stream, so that any stream may be far ahead of or behind any other.
enum class Pace { kInstant, kUneven, kSlow };

struct Stream {
  std::string name;
  int device = 0;
  CUstream handle = nullptr;
  Pace pace = Pace::kInstant;
  std::mt19937_64 random;
  bool of_test = false;  // made by a test, for the program's caller: no leak
  bool is_callers =
      false;             // the caller computes on it; every other stream is a lane of the program
  bool is_held = false;  // starts nothing
  int capturing = 0;     // 2: in CUDA's global mode, which forbids queries to all threads
  bool is_closing = false;  // destroyed; what is queued still runs
  bool has_ended = false;   // its thread touches nothing any more
  int64_t num_enqueued = 0;
  int64_t num_finished = 0;
  std::deque<Op> queue;          // the first one runs
  std::condition_variable work;  // wakes its thread
  std::thread worker;            // started by its first operation
};

using StreamPtr = std::shared_ptr<Stream>;

struct Event {
  std::string name;
  int device = 0;
  int64_t num_records = 0;
  PointPtr last;                 // null: never recorded
  std::weak_ptr<Stream> stream;  // of the last record
};

using EventPtr = std::shared_ptr<Event>;

// -- what tests set, and what they ask ---------------------------------------------------------

struct Failure {
  std::string call;  // "*": any
  int64_t countdown = 0;
  CUresult code = kSuccess;
  bool sticky = false;
};

struct Drop {
  std::string what;
  int64_t only = -1;  // which of the matching calls; -1: all
  int64_t num_seen = 0;
};

struct Counts {
  int64_t num_blocking_streams = 0;
  int64_t num_timing_events = 0;
  int64_t num_pageable_copies = 0;
  int64_t num_bad_pointers = 0;
  int64_t num_bad_handles = 0;
  int64_t num_use_after_free = 0;
  int64_t num_unregistered_in_use = 0;
  int64_t num_synchronize = 0;
  int64_t num_synchronize_caller = 0;
  int64_t num_calls_after_shutdown = 0;
  int64_t num_failures = 0;
  int64_t num_dropped = 0;
  int64_t push_balance_total = 0;
  int64_t num_h2d = 0;
  int64_t num_d2h = 0;
  int64_t num_d2d = 0;
  int64_t h2d_bytes = 0;
  int64_t d2h_bytes = 0;
  int64_t d2d_bytes = 0;
  int64_t largest_h2d_bytes = 0;
};

// All that a reset forgets.
struct State {
  uint64_t seed = 0;
  int64_t max_delay_us = 0;
  int num_devices = 2;
  int64_t retains[kMaxDevices] = {};
  std::map<CUstream, StreamPtr> streams;
  std::map<CUevent, EventPtr> events;
  std::map<int, StreamPtr> legacy;  // by device; made when first used
  std::vector<StreamPtr> closing;   // destroyed, not yet joined
  int64_t num_handles = 0;
  int64_t num_streams = 0;
  Ranges registered;
  int64_t registered_bytes = 0;
  int64_t registered_limit = -1;  // -1: none
  Ranges declared;
  bool any_memory_is_device = false;
  bool is_inline = false;
  std::map<int, CUstream> default_streams;  // by device; of threads that have none of their own
  std::vector<Failure> failures;
  std::vector<Failure> copy_failures;
  std::vector<Drop> drops;
  CUresult lost = kSuccess;  // every call returns it
  bool is_deinitialised = false;
  int64_t patience_ms = 20'000;
  Counts counts;
  std::map<std::string_view, int64_t> calls;  // names of functions, which stay
};

struct World : State {
  std::mutex mutex;
  std::condition_variable changed;  // something was done, lost or stopped
  bool is_initialised = false;      // survives a reset: a program calls cuInit once
  bool is_stopping = false;
  int64_t generation = 0;  // of resets
  int64_t progress = 0;
  std::list<std::string> blocked;  // who waits for what, in words

  // Nothing executes any more.
  bool is_dead() const { return lost != kSuccess || is_deinitialised || is_stopping; }
};

extern World& world;

// What belongs to the calling thread.
struct Thread {
  int64_t generation = -1;
  std::vector<int> contexts;  // devices of the contexts pushed, current one last
  int64_t push_balance = 0;
  bool is_caller = false;
  int capture_mode = 0;             // what it may do while others capture: 2 is anything
  std::map<int, CUstream> streams;  // current ones, by device
};

Thread& this_thread();

// -- verbs; all want the lock ------------------------------------------------------------------

StreamPtr make_stream(int device, unsigned flags);
StreamPtr legacy_stream(int device);
void close_stream(const StreamPtr& stream);

// Queues an operation, or executes it now where the stream is the host thread itself.
CUresult submit(Lock& lock, const StreamPtr& stream, Op op);

// Waits until `ready`; aborts with a report when nothing in the world has moved for long. Returns
// the code of a context that was lost meanwhile.
CUresult wait_until(Lock& lock, const std::string& who, const std::function<bool()>& ready);

// Waits for what was enqueued before.
CUresult drain(Lock& lock, const StreamPtr& stream, const std::string& who);

void lose(CUresult code);
void wake_all();

// Takes the range away and waits until no thread touches it. True if operations were pending on it.
bool withdraw(Lock& lock, const RangePtr& range);

// Forgets everything and starts anew; takes the lock itself.
void reset(uint64_t seed, int64_t max_delay_us);

}  // namespace simcuda
