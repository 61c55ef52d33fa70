// Streams: a thread each, first in, first out, late by a drawn delay. And the watch over waits, so
// that a deadlock among streams ends in a report and not in a hang.
#include "world.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace simcuda {
namespace {

using Clock = std::chrono::steady_clock;

// Waits are cut into this many, and those that ran out are counted: a process that was suspended
// has missed one of them, not all.
constexpr int kTicks = 20;

// A copy shows that it takes time by being done in up to this many pieces.
constexpr int kMaxPieces = 4;

// -- delays ------------------------------------------------------------------------------------

int64_t draw_delay(Stream& stream) {
  if (stream.pace == Pace::kInstant || world.max_delay_us == 0) return 0;
  if (stream.pace == Pace::kSlow) return world.max_delay_us;
  return std::uniform_int_distribution<int64_t>(0, world.max_delay_us)(stream.random);
}

void pause(Lock& lock, Stream& stream, int64_t us) {
  if (us == 0) return;
  const auto end = Clock::now() + std::chrono::microseconds(us);
  stream.work.wait_until(lock, end, [] { return world.is_dead(); });
}

// -- operations --------------------------------------------------------------------------------

bool is_gone(const RangePtr& range) { return range != nullptr && range->gone; }

void mark(const Op& op, int64_t Range::* count, int64_t by) {
  for (const RangePtr& range : {op.to_range, op.from_range}) {
    if (range != nullptr) (*range).*count += by;
  }
}

// Touches the bytes [begin, end) of an operation unless somebody took them away.
void touch(Lock& lock, const Op& op, int64_t begin, int64_t end) {
  if (world.is_dead() || is_gone(op.to_range) || is_gone(op.from_range)) return;
  mark(op, &Range::busy, 1);
  lock.unlock();
  void* to = reinterpret_cast<void*>(op.to + static_cast<uintptr_t>(begin));
  const auto nbytes = static_cast<size_t>(end - begin);
  if (op.kind == Op::Kind::kFill) {
    std::memset(to, op.value, nbytes);
  } else if (op.staged != nullptr) {
    std::memcpy(to, op.staged->data() + begin, nbytes);
  } else {
    std::memmove(to, reinterpret_cast<void*>(op.from + static_cast<uintptr_t>(begin)), nbytes);
  }
  lock.lock();
  mark(op, &Range::busy, -1);
  ++world.progress;
  world.changed.notify_all();
}

// In pieces, in either direction: nobody may rely on the order of bytes within a copy.
void touch_all(Lock& lock, Stream& stream, const Op& op, bool hurried) {
  const auto num_pieces = static_cast<int64_t>(1 + stream.random() % kMaxPieces);
  const bool backwards = stream.random() % 2 == 1;
  for (int64_t i = 0; i < num_pieces; ++i) {
    const int64_t piece = backwards ? num_pieces - 1 - i : i;
    if (i > 0 && !hurried) pause(lock, stream, draw_delay(stream) / num_pieces);
    touch(lock, op, op.nbytes * piece / num_pieces, op.nbytes * (piece + 1) / num_pieces);
  }
}

void execute(Lock& lock, Stream& stream, const Op& op, bool hurried) {
  if (!hurried) pause(lock, stream, draw_delay(stream));
  if (world.is_dead()) return;
  switch (op.kind) {
    case Op::Kind::kCopy:
      if (op.breaks != kSuccess) return lose(op.breaks);
      [[fallthrough]];
    case Op::Kind::kFill:
      return touch_all(lock, stream, op, hurried);
    case Op::Kind::kWait:
      wait_until(lock, stream.name + " waits for " + op.point->name,
                 [&] { return op.point->reached; });
      return;
    case Op::Kind::kRecord:
      op.point->reached = true;
      return;
    case Op::Kind::kDelay:
      return pause(lock, stream, op.delay_us);
  }
}

void finish(Stream& stream, const Op& op) {
  mark(op, &Range::pending, -1);
  ++stream.num_finished;
  ++world.progress;
  world.changed.notify_all();
}

void work(const StreamPtr& self) {
  Stream& stream = *self;
  Lock lock(world.mutex);
  while (true) {
    stream.work.wait(lock, [&] {
      const bool may_start = !stream.queue.empty() && (!stream.is_held || world.is_dead());
      return may_start || world.is_stopping || (stream.is_closing && stream.queue.empty());
    });
    if (stream.queue.empty()) break;
    execute(lock, stream, stream.queue.front(), false);
    finish(stream, stream.queue.front());
    stream.queue.pop_front();
  }
  stream.has_ended = true;
}

// -- deadlocks ---------------------------------------------------------------------------------

const char* in_words(Op::Kind kind) {
  switch (kind) {
    case Op::Kind::kCopy:
      return "a copy";
    case Op::Kind::kFill:
      return "a memset";
    case Op::Kind::kWait:
      return "a wait for ";
    case Op::Kind::kRecord:
      return "the record of ";
    case Op::Kind::kDelay:
      return "a delay";
  }
  return "";
}

void report(const Stream& stream) {
  std::fprintf(stderr, "  %s on device %d%s: %lld of %lld operations done", stream.name.c_str(),
               stream.device, stream.is_held ? ", held by the test" : "",
               static_cast<long long>(stream.num_finished),
               static_cast<long long>(stream.num_enqueued));
  if (!stream.queue.empty()) {
    const Op& next = stream.queue.front();
    std::fprintf(stderr, "; next is %s%s", in_words(next.kind),
                 next.point == nullptr ? "" : next.point->name.c_str());
  }
  std::fprintf(stderr, "\n");
}

[[noreturn]] void give_up() {
  std::fprintf(stderr, "simcuda: deadlock: nothing has moved for %lld ms. Who waits for what:\n",
               static_cast<long long>(world.patience_ms));
  for (const std::string& who : world.blocked) std::fprintf(stderr, "  %s\n", who.c_str());
  std::fprintf(stderr, "Streams:\n");
  for (const auto& [device, stream] : world.legacy) report(*stream);
  for (const auto& [handle, stream] : world.streams) report(*stream);
  for (const StreamPtr& stream : world.closing) report(*stream);
  std::abort();
}

// -- the life of a stream ----------------------------------------------------------------------

StreamPtr new_stream(int device, std::string name, uint64_t number) {
  auto stream = std::make_shared<Stream>();
  stream->name = std::move(name);
  stream->device = device;
  stream->random.seed(world.seed * 1'000'003 + number);
  stream->pace = static_cast<Pace>(stream->random() % 3);
  return stream;
}

// Threads of destroyed streams that have nothing left to do. The last thing they did was to give
// the lock back.
void join_ended() {
  std::erase_if(world.closing, [](const StreamPtr& stream) {
    if (stream->worker.joinable()) {
      if (!stream->has_ended) return false;
      stream->worker.join();
    }
    return true;
  });
}

std::vector<StreamPtr> all_streams() {
  std::vector<StreamPtr> all = world.closing;
  for (const auto& [device, stream] : world.legacy) all.push_back(stream);
  for (const auto& [handle, stream] : world.streams) all.push_back(stream);
  return all;
}

}  // namespace

// Never destroyed: threads of streams may outlive the program's static objects.
World& world = *new World;

Thread& this_thread() {
  thread_local Thread thread;
  if (thread.generation != world.generation) {
    thread = Thread{};
    thread.generation = world.generation;
  }
  return thread;
}

StreamPtr make_stream(int device, unsigned flags) {
  join_ended();
  const int64_t number = ++world.num_streams;
  StreamPtr stream = new_stream(device, "stream " + std::to_string(number), number);
  stream->handle = reinterpret_cast<CUstream>(0x5000'0000 + 16 * ++world.num_handles);
  if ((flags & kStreamNonBlocking) == 0) ++world.counts.num_blocking_streams;
  world.streams[stream->handle] = stream;
  return stream;
}

StreamPtr legacy_stream(int device) {
  StreamPtr& stream = world.legacy[device];
  if (stream == nullptr) {
    stream = new_stream(device, "legacy stream", 1'000 + static_cast<uint64_t>(device));
    stream->is_callers = true;
  }
  return stream;
}

void close_stream(const StreamPtr& stream) {
  stream->is_closing = true;
  stream->is_held = false;
  stream->work.notify_all();
  world.closing.push_back(stream);
  world.streams.erase(stream->handle);
  join_ended();
}

CUresult submit(Lock& lock, const StreamPtr& stream, Op op) {
  if (world.is_inline && stream->is_callers) {
    const CUresult code = drain(lock, stream, "the host, as " + stream->name);
    if (code != kSuccess) return code;
    mark(op, &Range::pending, 1);
    ++stream->num_enqueued;
    execute(lock, *stream, op, true);
    finish(*stream, op);
    return kSuccess;
  }
  mark(op, &Range::pending, 1);
  ++stream->num_enqueued;
  stream->queue.push_back(std::move(op));
  if (!stream->worker.joinable()) stream->worker = std::thread(work, stream);
  stream->work.notify_all();
  return kSuccess;
}

CUresult wait_until(Lock& lock, const std::string& who, const std::function<bool()>& ready) {
  const int64_t generation = world.generation;
  const auto tick = std::chrono::milliseconds(std::max<int64_t>(world.patience_ms / kTicks, 1));
  const auto is_over = [&] { return ready() || world.is_dead() || world.generation != generation; };
  const auto entry = world.blocked.insert(world.blocked.end(), who);
  int64_t seen = world.progress;
  int num_ticks = 0;
  while (!world.changed.wait_for(lock, tick, is_over)) {
    num_ticks = world.progress == seen ? num_ticks + 1 : 0;
    seen = world.progress;
    if (num_ticks >= kTicks) give_up();
  }
  world.blocked.erase(entry);
  if (world.lost != kSuccess) return world.lost;
  return ready() ? kSuccess : kDeinitialized;
}

CUresult drain(Lock& lock, const StreamPtr& stream, const std::string& who) {
  const int64_t num_before = stream->num_enqueued;
  return wait_until(lock, who + " waits for the end of " + stream->name,
                    [&] { return stream->num_finished >= num_before; });
}

void wake_all() {
  world.changed.notify_all();
  for (const StreamPtr& stream : all_streams()) stream->work.notify_all();
}

void lose(CUresult code) {
  world.lost = code;
  wake_all();
}

bool withdraw(Lock& lock, const RangePtr& range) {
  range->gone = true;
  const bool was_pending = range->pending > 0;
  world.changed.wait(lock, [&] { return range->busy == 0; });
  return was_pending;
}

void reset(uint64_t seed, int64_t max_delay_us) {
  Lock lock(world.mutex);
  const std::vector<StreamPtr> streams = all_streams();
  world.is_stopping = true;
  ++world.generation;
  wake_all();
  lock.unlock();
  for (const StreamPtr& stream : streams) {
    if (stream->worker.joinable()) stream->worker.join();
  }
  lock.lock();
  static_cast<State&>(world) = State{};
  world.seed = seed;
  world.max_delay_us = max_delay_us;
  world.is_stopping = false;
}

}  // namespace simcuda
