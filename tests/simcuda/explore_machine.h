// What surrounds the engine in an exploration: a disk, a reader, a device with its lanes, and the
// memory of all three. Nothing in it moves by itself; whoever explores says which read completes
// and which lane takes a step.
//
// Every byte of the disk is its own: a byte in the wrong place, too early or too late, is seen by
// the kernel that reads it. And an order that was not asked for is seen even where it happens to
// hold: while a read or a copy is under way, its memory must not be anybody else's.
//
// Note [What takes no time]
// Points and waits at the front of a lane pass at once, and a kernel is enqueued as soon as its
// group is acquired. Nothing is lost by that. Nobody sees that a copy is done but by the event
// behind it, or by an unordered look at its memory, which is found anyway; and nobody sees when a
// kernel was enqueued, while earlier is when memory that it needs is more easily touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "device/device.h"
#include "io/reader.h"

namespace nexus {
class Engine;
}

namespace explore {

// kDirect: a device whose memory the disk writes into.
enum class Place : uint8_t { kDevice, kHost, kDirect };

// One small world.
struct Config {
  const char* name = "";
  // "arena[R][B]" of each: R stays in RAM, B is brief. Those that `order` lacks are residents.
  const char* groups = "";
  const char* order = "";
  const char* script = "";  // what the caller does; see explore_caller.cpp
  int lookahead = 1;
  int num_pieces = 1;  // of every group; see unit()
  int num_slots = 3;
  int depth = 2;
  Place place = Place::kDevice;
  bool poison = false;
  bool early_kernel = false;  // work from before the engine reads the arenas' memory
  bool no_pin = false;        // nothing can be page-locked once the engine is attached
  bool polls = false;         // who waits for a while only, may look up in between
  int num_errors = 0;         // reads that may fail
  int num_agains = 0;         // reads that may have to be repeated
  int num_flips = 0;          // reads that may bring a wrong byte
};

constexpr int kMostArenas = 3;
constexpr int kMostGroups = 6;
constexpr auto kUnset = std::byte{0x00};
constexpr auto kReading = std::byte{0xfe};  // of a read that did not come back
constexpr auto kPoison = std::byte{0xff};

// The caller is the first fiber, the engine's own thread the second.
constexpr int kCaller = 0;
constexpr int kEngine = 1;
// The first lanes are what the caller computes on.
constexpr size_t kNumStreams = 2;

struct Op {
  enum class Kind : uint8_t { kWrite, kPoison, kKernel, kRecord, kWait };
  Kind kind;
  std::byte* to = nullptr;
  const std::byte* from = nullptr;
  int nbytes = 0;
  uint64_t generation = 0;   // of the arena it reads
  uint64_t comes_after = 0;  // a write: whoever reads an earlier generation must be through
  int group = -1;
  uint32_t ticket = 0;
};

// Where a thread stands that has opened the lock for a while.
struct Window {
  char first_call = 0;
  uint8_t num_calls = 0;
  int arena = -1;  // that the engine's thread works on
  // When it was opened:
  uint64_t generations[kMostArenas] = {};
  int groups[kMostArenas] = {};
};

struct Machine {
  const Config* config = nullptr;
  nexus::Engine* engine = nullptr;
  std::vector<std::vector<Op>> lanes = {};
  size_t stream = 0;                  // the caller's current one
  std::vector<uint32_t> latest = {};  // by event: its last record; 0: never recorded
  uint32_t num_tickets = 0;
  std::vector<nexus::Request*> reading = {};
  std::vector<nexus::Request*> answers = {};
  nexus::Request* taken = nullptr;  // the answer that the engine looks at
  Window windows[2] = {};
  int num_errors = 0, num_agains = 0, num_flips = 0;  // that happened
  int64_t num_submitted = 0, num_copied = 0, num_acquired = 0;
  int num_steps = 0;                  // the caller's place in its script
  bool has_failed[kMostGroups] = {};  // a read of this group did, and nobody was told yet
  // The device's: its arenas, and behind them the caller's clones.
  std::vector<std::byte> memory = {};
};

Machine& machine();

// Bytes of a piece: one, or the page that a disk writes into a device. All are the same.
int64_t unit();
int64_t group_nbytes();
std::byte* arena_memory(int arena);
std::byte* clone_memory(int group);
// Its number; -1 for other memory.
int arena_at(const std::byte* at);
int clone_at(const std::byte* at);

// The first thing that went wrong, or empty. Outside of the block: it outlives a moment.
extern char violation[512];
void violate(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Whether steps are told on standard output.
extern bool is_telling;
void tell(const char* format, ...) __attribute__((format(printf, 1, 2)));

std::unique_ptr<nexus::Device> make_device();
bool is_ring_slot(int64_t nbytes);
// What the calling thread does while the lock is open.
void note_call(char what);

bool is_pending(uint32_t ticket);
bool are_lanes_empty();
// No read is under way either.
bool is_at_rest();
// What the engine's event stands for: the record that was its last when it was asked.
uint32_t ticket_of(const void* event);

// Expects the bytes of `group`, or of nobody.
void enqueue_kernel(const std::byte* at, uint64_t generation, int group);
// The processor looks now.
void look(const std::byte* at, int group);
void enqueue_write_back(std::byte* to, const std::byte* from);

// -- what may happen
enum class Answer : uint8_t { kBytes, kError, kAgain, kFlip };
bool may_answer(Answer answer);
void complete_read(size_t index, Answer answer);
bool may_step(size_t lane);
void step_lane(size_t lane);

}  // namespace explore
