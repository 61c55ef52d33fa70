#include "explore_machine.h"

#include <algorithm>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "common/error.h"
#include "explore_engine.h"
#include "explore_fibers.h"
#include "io/ladder.h"
#include "io/reader_split.h"
#include "io/staging.h"
#include "io/window.h"

namespace explore {

char violation[512];
bool is_telling = false;

void violate(const char* format, ...) {
  if (violation[0] != 0) return;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(violation, sizeof(violation), format, arguments);
  va_end(arguments);
}

void tell(const char* format, ...) {
  if (!is_telling) return;
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::putchar('\n');
}

Machine& machine() { return *static_cast<Machine*>(root()); }

namespace {

using Bytes = std::span<const std::byte>;

bool overlap(Bytes a, Bytes b) {
  return a.data() < b.data() + b.size() && b.data() < a.data() + a.size();
}

// The place of `at` among the device's memory, in groups; -1 for other memory.
int64_t row_at(const std::byte* at) {
  const auto& memory = machine().memory;
  const bool is_there = at >= memory.data() && at < memory.data() + memory.size();
  return is_there ? (at - memory.data()) / group_nbytes() : -1;
}

std::byte byte_on_disk(int64_t offset) { return static_cast<std::byte>(1 + offset / unit()); }

uint64_t generation_at(const std::byte* at) {
  return nexus::Explorer::generation(*machine().engine, arena_at(at));
}

// "arena 1", for messages.
std::string place_name(const std::byte* at) {
  if (arena_at(at) >= 0) return nexus::concat("arena ", arena_at(at));
  if (clone_at(at) >= 0) return nexus::concat("clone ", clone_at(at));
  return "host memory";
}

template <typename Check>
void for_all_ops(const Check& check) {
  for (const auto& lane : machine().lanes) {
    for (const Op& op : lane) check(op);
  }
}

bool is_read_into(Bytes memory) {
  return std::ranges::any_of(machine().reading, [&](const nexus::Request* read) {
    return overlap(memory, {read->buffer, static_cast<size_t>(read->nbytes)});
  });
}

// -- lanes

void run(const Op& op);

// See Note [What takes no time].
void settle() {
  bool has_moved = true;
  while (has_moved) {
    has_moved = false;
    for (auto& lane : machine().lanes) {
      while (!lane.empty()) {
        const Op& first = lane.front();
        const bool goes = first.kind == Op::Kind::kRecord ||
                          (first.kind == Op::Kind::kWait && !is_pending(first.ticket));
        if (!goes) break;
        lane.erase(lane.begin());
        has_moved = true;
      }
    }
  }
}

void enqueue(size_t lane, const Op& op) {
  machine().lanes[lane].push_back(op);
  settle();
}

// Of a host, copies are done when they return. Kernels take their time everywhere.
void enqueue_write(size_t lane, const Op& op) {
  const Bytes to(op.to, static_cast<size_t>(op.nbytes));
  if (is_read_into(to)) violate("a write into %s, where a read lands", place_name(op.to).c_str());
  if (op.from != nullptr && is_read_into({op.from, static_cast<size_t>(op.nbytes)})) {
    violate("a copy to %s from memory where a read lands", place_name(op.to).c_str());
  }
  if (machine().config->place == Place::kHost) return run(op);
  enqueue(lane, op);
}

void run_write(const Op& op) {
  const Bytes to(op.to, static_cast<size_t>(op.nbytes));
  for_all_ops([&](const Op& other) {
    const Bytes from(other.from, static_cast<size_t>(other.nbytes));
    if (other.from == nullptr || arena_at(other.from) < 0 || !overlap(to, from)) return;
    if (other.generation < op.comes_after) {
      violate("%s is overwritten while the computation still reads group %d there",
              place_name(op.to).c_str(), other.group);
    }
  });
  if (op.kind == Op::Kind::kPoison) {
    std::memset(op.to, static_cast<int>(kPoison), static_cast<size_t>(op.nbytes));
  } else {
    std::memcpy(op.to, op.from, static_cast<size_t>(op.nbytes));
  }
}

// Bytes that happen to be right already do not excuse it.
void run_kernel(const Op& op) {
  const Bytes from(op.from, static_cast<size_t>(op.nbytes));
  for_all_ops([&](const Op& other) {
    const Bytes to(other.to, static_cast<size_t>(other.nbytes));
    if (arena_at(op.from) < 0 || other.to == nullptr || !overlap(to, from)) return;
    if (other.comes_after <= op.generation) {
      violate("group %d is read in %s before its copies are through", op.group,
              place_name(op.from).c_str());
    }
  });
  look(op.from, op.group);
}

void run(const Op& op) {
  if (op.kind == Op::Kind::kKernel) return run_kernel(op);
  run_write(op);
}

// -- the device

class ToyDevice final : public nexus::Device {
 public:
  std::string name() const override { return "toy"; }
  bool is_host() const override { return machine().config->place == Place::kHost; }

  void prepare(std::byte*, int64_t) override {}
  void pin(std::span<std::byte>) override {
    note_call('P');
    const bool is_attached = num_fibers() > kEngine;
    if (machine().config->no_pin && is_attached) nexus::fail("DeviceError", "no room");
  }
  void unpin(std::byte*) noexcept override {}

  // Handles count from one: none is null.
  nexus::Lane make_lane() override {
    machine().lanes.emplace_back();
    return {handle_of(machine().lanes.size())};
  }
  nexus::Event make_event() override {
    machine().latest.push_back(0);
    return {handle_of(machine().latest.size())};
  }
  nexus::Lane current() override { return {handle_of(machine().stream + 1)}; }

  void copy(nexus::Lane lane, std::byte* to, const std::byte* host, int64_t nbytes) override {
    tell("    lane %zu: copy to %s", lane_at(lane), place_name(to).c_str());
    ++machine().num_copied;
    enqueue_write(lane_at(lane), {.kind = Op::Kind::kWrite,
                                  .to = to,
                                  .from = host,
                                  .nbytes = static_cast<int>(nbytes),
                                  .comes_after = generation_at(to)});
  }
  // To a clone of the caller's, which nobody else knows.
  void copy_within(nexus::Lane lane, std::byte* to, const std::byte* from,
                   int64_t nbytes) override {
    tell("    lane %zu: copy from %s to %s", lane_at(lane), place_name(from).c_str(),
         place_name(to).c_str());
    enqueue_write(lane_at(lane), {.kind = Op::Kind::kWrite,
                                  .to = to,
                                  .from = from,
                                  .nbytes = static_cast<int>(nbytes),
                                  .generation = generation_at(from)});
  }
  void fetch(nexus::Lane lane, std::byte* host, const std::byte* from, int64_t nbytes) override {
    note_call('F');
    enqueue_write(lane_at(lane), {.kind = Op::Kind::kWrite,
                                  .to = host,
                                  .from = from,
                                  .nbytes = static_cast<int>(nbytes),
                                  .generation = generation_at(from)});
  }
  // All kernels of this generation are through, and none of the next may have begun.
  void poison(nexus::Lane lane, std::byte* at, int64_t nbytes) override {
    tell("    lane %zu: poison %s", lane_at(lane), place_name(at).c_str());
    enqueue_write(lane_at(lane), {.kind = Op::Kind::kPoison,
                                  .to = at,
                                  .nbytes = static_cast<int>(nbytes),
                                  .comes_after = generation_at(at) + 1});
  }

  void record(nexus::Event event, nexus::Lane lane) override {
    tell("    lane %zu: record event %zu", lane_at(lane), event_at(event));
    if (is_host()) return;
    uint32_t& latest = machine().latest[event_at(event)];
    latest = ++machine().num_tickets;
    enqueue(lane_at(lane), {.kind = Op::Kind::kRecord, .ticket = latest});
  }
  void wait(nexus::Lane lane, nexus::Event event) override {
    tell("    lane %zu: wait for event %zu", lane_at(lane), event_at(event));
    enqueue(lane_at(lane), {.kind = Op::Kind::kWait, .ticket = ticket_of(event.handle)});
  }
  bool is_done(nexus::Event event) override { return !is_pending(ticket_of(event.handle)); }
  void block(nexus::Event event) override {
    note_call('B');
    if (is_host()) return;
    stop(Wants::kEvent,
         reinterpret_cast<const void*>(static_cast<uintptr_t>(ticket_of(event.handle))));
    fiber(current_fiber()).holds_turn = true;
  }
  void drain() noexcept override { stop(Wants::kIdle, nullptr); }

 private:
  static void* handle_of(size_t number) { return reinterpret_cast<void*>(number); }
  static size_t lane_at(nexus::Lane lane) {
    if (lane.handle == nullptr) nexus::fail("EngineError", "no lane was given");
    return reinterpret_cast<size_t>(lane.handle) - 1;
  }
  static size_t event_at(nexus::Event event) { return reinterpret_cast<size_t>(event.handle) - 1; }
};

// -- the reader

class ToyReader final : public nexus::Reader {
 public:
  int depth() const override { return machine().config->depth; }
  std::string name() const override { return "toy"; }

  void submit(nexus::Request* request) override {
    tell("    read piece %lld into %s", static_cast<long long>(request->offset / unit()),
         place_name(request->buffer).c_str());
    const Bytes buffer(request->buffer, static_cast<size_t>(request->nbytes));
    if (is_read_into(buffer)) violate("two reads at a time into the same memory");
    for_all_ops([&](const Op& op) { check_apart(op, buffer); });
    std::memset(request->buffer, static_cast<int>(kReading), buffer.size());
    machine().reading.push_back(request);
    if (machine().taken == request) machine().taken = nullptr;
    ++machine().num_submitted;
  }

  nexus::Request* wait() override {
    note_call('A');
    machine().taken = nullptr;
    stop(Wants::kAnswer, nullptr);
    fiber(current_fiber()).holds_turn = true;
    machine().taken = machine().answers.front();
    machine().answers.erase(machine().answers.begin());
    return machine().taken;
  }

 private:
  static void check_apart(const Op& op, Bytes buffer) {
    const auto nbytes = static_cast<size_t>(op.nbytes);
    if (op.from != nullptr && overlap(buffer, {op.from, nbytes})) {
      violate(op.kind == Op::Kind::kKernel
                  ? "a read lands in %s where a kernel still reads group %d"
                  : "a read lands in %s while a copy from there is pending",
              place_name(buffer.data()).c_str(), op.group);
    }
    if (op.to != nullptr && overlap(buffer, {op.to, nbytes})) {
      violate("a read lands in %s while a write there is pending",
              place_name(buffer.data()).c_str());
    }
  }
};

bool is_at_front(size_t lane, Op::Kind kind) { return machine().lanes[lane].front().kind == kind; }

}  // namespace

int64_t unit() { return machine().config->place == Place::kDirect ? 4096 : 1; }
int64_t group_nbytes() { return machine().config->num_pieces * unit(); }

std::byte* arena_memory(int arena) { return machine().memory.data() + arena * group_nbytes(); }
std::byte* clone_memory(int group) { return arena_memory(kMostArenas + group); }

int arena_at(const std::byte* at) {
  const int64_t row = row_at(at);
  return row < kMostArenas ? static_cast<int>(row) : -1;
}
int clone_at(const std::byte* at) {
  return static_cast<int>(std::max<int64_t>(-1, row_at(at) - kMostArenas));
}

bool is_ring_slot(int64_t nbytes) {
  return nbytes == nexus::slot_bytes({.memory = 1, .offset = 4096}, unit());
}

void note_call(char what) {
  if (current_fiber() < 0) return;
  Window& window = machine().windows[current_fiber()];
  if (window.num_calls++ == 0) window.first_call = what;
}

std::unique_ptr<nexus::Device> make_device() { return std::make_unique<ToyDevice>(); }

uint32_t ticket_of(const void* event) {
  return machine().latest[reinterpret_cast<size_t>(event) - 1];
}

bool is_pending(uint32_t ticket) {
  if (ticket == 0) return false;
  return std::ranges::any_of(machine().lanes, [&](const auto& lane) {
    return std::ranges::any_of(
        lane, [&](const Op& op) { return op.kind == Op::Kind::kRecord && op.ticket == ticket; });
  });
}

bool are_lanes_empty() {
  return std::ranges::all_of(machine().lanes, [](const auto& lane) { return lane.empty(); });
}

bool is_at_rest() {
  return are_lanes_empty() && machine().reading.empty() && machine().answers.empty();
}

void enqueue_kernel(const std::byte* at, uint64_t generation, int group) {
  tell("    lane %zu: kernel reads group %d in %s", machine().stream, group,
       place_name(at).c_str());
  if (is_read_into({at, static_cast<size_t>(group_nbytes())})) {
    violate("a kernel reads %s, where a read lands", place_name(at).c_str());
  }
  enqueue(machine().stream, {.kind = Op::Kind::kKernel,
                             .from = at,
                             .nbytes = static_cast<int>(group_nbytes()),
                             .generation = generation,
                             .group = group});
}

void look(const std::byte* at, int group) {
  for (int64_t i = 0; i < group_nbytes(); i += unit()) {
    const std::byte wanted = group < 0 ? kUnset : byte_on_disk(group * group_nbytes() + i);
    if (at[i] == wanted) continue;
    violate("who reads group %d in %s finds %02x instead of %02x in piece %lld", group,
            place_name(at).c_str(), static_cast<unsigned>(at[i]), static_cast<unsigned>(wanted),
            static_cast<long long>(i / unit()));
  }
}

void enqueue_write_back(std::byte* to, const std::byte* from) {
  tell("    lane %zu: write %s back to %s", machine().stream, place_name(from).c_str(),
       place_name(to).c_str());
  enqueue_write(machine().stream, {.kind = Op::Kind::kWrite,
                                   .to = to,
                                   .from = from,
                                   .nbytes = static_cast<int>(group_nbytes()),
                                   .comes_after = generation_at(to) + 1});
}

// -- what may happen

bool may_answer(Answer answer) {
  const Machine& now = machine();
  switch (answer) {
    case Answer::kBytes:
      return true;
    case Answer::kError:
      return now.num_errors < now.config->num_errors;
    case Answer::kAgain:
      return now.num_agains < now.config->num_agains;
    case Answer::kFlip:
      return now.num_flips < now.config->num_flips;
  }
  return false;
}

void complete_read(size_t index, Answer answer) {
  Machine& now = machine();
  nexus::Request* const request = now.reading[index];
  now.reading.erase(now.reading.begin() + static_cast<std::ptrdiff_t>(index));
  now.answers.push_back(request);
  now.num_errors += answer == Answer::kError;
  now.num_agains += answer == Answer::kAgain;
  now.num_flips += answer == Answer::kFlip;
  if (answer == Answer::kError || answer == Answer::kAgain) {
    request->result = answer == Answer::kError ? -EIO : -EAGAIN;
    if (answer == Answer::kError) now.has_failed[request->offset / group_nbytes()] = true;
    return;
  }
  for (int64_t i = 0; i < request->nbytes; ++i) {
    request->buffer[i] = byte_on_disk(request->offset + i);
  }
  if (answer == Answer::kFlip) request->buffer[0] ^= std::byte{0x80};
  request->result = request->nbytes;
}

bool may_step(size_t lane) {
  return !machine().lanes[lane].empty() && !is_at_front(lane, Op::Kind::kWait);
}

void step_lane(size_t lane) {
  auto& ops = machine().lanes[lane];
  const Op op = ops.front();
  ops.erase(ops.begin());
  run(op);
  settle();
}

}  // namespace explore

// -- in place of csrc/io/ladder.cpp, reader_split.cpp, reader_threads.cpp, file.cpp, staging.cpp --

namespace nexus {

Rung prepare_files(const std::vector<std::unique_ptr<File>>&, const ReadMode&) {
  Rung rung;
  rung.io = explore::machine().config->place == explore::Place::kDirect ? "gds" : "buffered";
  return rung;
}

void make_reader(Rung& rung, const ReadMode&, const Buffers&) {
  rung.reader = std::make_unique<explore::ToyReader>();
}

// The one reader here may do both.
std::unique_ptr<Reader> make_split_reader(std::unique_ptr<Reader> inner,
                                          std::shared_ptr<ExternalReader>, IsExternal) {
  return inner;
}

// Rows are read past the engine; nobody here asks for any.
std::unique_ptr<Reader> make_threads_reader(int, bool) { std::abort(); }

File::File(std::string path, const Stamp& expected)
    : path_(std::move(path)), stamp_(expected), arrived_(true) {}
void File::settle(int64_t) {}
File::~File() = default;
void File::refuse_direct(const std::string&) {}
void File::check_unchanged() const { explore::note_call('U'); }
void File::drop(int64_t, int64_t) const {}

// Reads are whole units here: a slot needs no margin for more.
Staging::Staging(int num_slots, int64_t slot_bytes)
    : stride_(explore::is_ring_slot(slot_bytes) ? explore::unit() : slot_bytes),
      nbytes_(stride_ * num_slots) {
  base_ = static_cast<std::byte*>(::operator new(static_cast<size_t>(nbytes_)));
  std::memset(base_, 0, static_cast<size_t>(nbytes_));
}
Staging::~Staging() { ::operator delete(base_); }

}  // namespace nexus
