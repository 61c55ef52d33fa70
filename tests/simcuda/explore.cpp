// Every interleaving of the real engine in a small world.
//
//   explore [-t] [-b] name=ring groups="0 1 0 1" order="0 1 2 3" script="0 1 2 3" ...
//
// Who may act next: the caller, the engine's own thread, the disk with any read that is under way,
// any lane of the device. From every state each of them is tried; a state that was seen before is
// not gone into again. Nothing is left to chance or cut short: the line that ends in "ok" is
// printed when there is no state left. What is wrong in any of them ends the search.
//
// -t tells the story of what went wrong, step by step. -b looks at every known state that is
// reached on another way as if it were new, and compares where it leads: then what counts as the
// same state is right. The words of a world are those of Config.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/error.h"
#include "explore_caller.h"
#include "explore_engine.h"
#include "explore_fibers.h"
#include "explore_machine.h"

namespace explore {
namespace {

// More than any world here needs: a bound that is hit is a failure, not an answer.
constexpr size_t kMostStates = 40'000'000;

struct Move {
  enum class Who : uint8_t { kFiber, kDisk, kLane };
  Who who;
  uint8_t index;
  Answer answer = Answer::kBytes;
};

// -- states seen -------------------------------------------------------------------------------

struct Print {
  uint64_t a = 0;
  uint64_t b = 0;
  bool operator==(const Print&) const = default;
};

struct PrintHash {
  size_t operator()(const Print& print) const { return print.a; }
};

// 128 bits: two states of a hundred million that look the same by accident are not to be expected.
Print print_of(const std::vector<uint8_t>& bytes) {
  Print print{0x9e3779b97f4a7c15, 0xc2b2ae3d27d4eb4f};
  const auto mix = [&print](uint64_t word) {
    print.a = (print.a ^ word) * 0xff51afd7ed558ccd;
    print.a ^= print.a >> 32;
    print.b = (print.b + word) * 0xc4ceb9fe1a85ec53;
    print.b ^= print.b >> 29;
  };
  size_t i = 0;
  for (; i + sizeof(uint64_t) <= bytes.size(); i += sizeof(uint64_t)) {
    uint64_t word;
    std::memcpy(&word, &bytes[i], sizeof(word));
    mix(word);
  }
  for (; i < bytes.size(); ++i) mix(bytes[i]);
  mix(bytes.size());
  return print;
}

Print print_now() {
  static std::vector<uint8_t> bytes;
  bytes.clear();
  if (machine().engine != nullptr) nexus::Explorer::describe(*machine().engine, bytes);
  return print_of(bytes);
}

// -- moves -------------------------------------------------------------------------------------

bool may_run(const Fiber& fiber) {
  switch (fiber.wants) {
    case Wants::kAnswer:
      return !machine().answers.empty();
    case Wants::kEvent:
      return !is_pending(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(fiber.what)));
    case Wants::kIdle:
      return are_lanes_empty();
    case Wants::kNotice:
      return fiber.is_noticed || (machine().config->polls && !fiber.is_patient);
    default:
      return may_go_on(fiber);
  }
}

void find_moves(std::vector<Move>& moves) {
  moves.clear();
  for (int i = 0; i < num_fibers(); ++i) {
    if (may_run(fiber(i))) moves.push_back({Move::Who::kFiber, static_cast<uint8_t>(i)});
  }
  for (size_t i = 0; i < machine().reading.size(); ++i) {
    for (const Answer answer : {Answer::kBytes, Answer::kError, Answer::kAgain, Answer::kFlip}) {
      if (!may_answer(answer)) continue;
      moves.push_back({Move::Who::kDisk, static_cast<uint8_t>(i), answer});
    }
  }
  for (size_t i = 0; i < machine().lanes.size(); ++i) {
    if (may_step(i)) moves.push_back({Move::Who::kLane, static_cast<uint8_t>(i)});
  }
}

void make(const Move& move) {
  if (move.who == Move::Who::kFiber) {
    tell("%s runs", move.index == kCaller ? "caller" : "engine");
    step(move.index);
  } else if (move.who == Move::Who::kDisk) {
    const Inside inside;
    tell("disk: piece %lld comes%s",
         static_cast<long long>(machine().reading[move.index]->offset / unit()),
         move.answer == Answer::kBytes ? "" : ", or does not");
    complete_read(move.index, move.answer);
  } else {
    const Inside inside;
    tell("lane %d: a step", move.index);
    step_lane(move.index);
  }
  if (violation[0] == 0 && machine().engine != nullptr && num_fibers() > kEngine) {
    nexus::Explorer::check(*machine().engine);
  }
}

// Nothing can move: that is how it should end, or it hangs.
void check_rest() {
  if (fiber(kCaller).wants != Wants::kOver) {
    violate("the caller waits for ever, in step %d", machine().num_steps);
  }
  nexus::Explorer::check_end(*machine().engine);
}

// -- the search --------------------------------------------------------------------------------

class Search {
 public:
  explicit Search(const Config& config, bool is_both_ways)
      : config_(config), is_both_ways_(is_both_ways) {}

  // True when all of the world was seen and nothing was wrong.
  bool run() {
    begin_world(config_);
    enter();
    while (depth_ > 0 && violation[0] == 0 && seen_.size() < kMostStates) go_on();
    if (violation[0] == 0 && seen_.size() >= kMostStates) violate("too many states");
    report();
    return violation[0] == 0;
  }

  const std::vector<Move>& path() const { return path_; }

 private:
  struct Level {
    Moment moment;
    std::vector<Move> moves;
    size_t next = 0;
    Print print;
    uint64_t leads_to = 0;  // a sum over the states that follow
    bool is_known = false;  // seen on another way
  };

  // The world is in a state that it just came to.
  void enter() {
    if (violation[0] != 0) return;
    const Print print = print_now();
    if (depth_ > 0) top().leads_to += print.a ^ (print.b << 1);
    const bool is_known = !seen_.try_emplace(print, 0).second;
    const bool was_gone_into = depth_ > 0 && top().is_known;
    if (is_known && (!is_both_ways_ || was_gone_into)) return leave_path();
    if (depth_ > 0 && top().is_known) return leave_path();
    if (levels_.size() == depth_) levels_.emplace_back();
    ++depth_;
    Level& level = top();
    find_moves(level.moves);
    level.next = 0;
    level.print = print;
    level.leads_to = 0;
    level.is_known = is_known;
    deepest_ = std::max(deepest_, depth_);
    if (level.moves.empty()) {
      check_rest();
      ++num_ends_;
    } else if (level.moves.size() > 1) {
      level.moment.take();
    }
  }

  void go_on() {
    Level& level = top();
    if (level.next == level.moves.size()) return leave();
    if (level.next > 0) level.moment.bring_back();
    const Move move = level.moves[level.next++];
    path_.push_back(move);
    ++num_transitions_;
    make(move);
    enter();
  }

  void leave() {
    const Level& level = top();
    uint64_t& leads_to = seen_.at(level.print);
    if (is_both_ways_ && level.is_known && leads_to != level.leads_to) {
      violate("two states look the same and lead to different ones");
    }
    leads_to = level.leads_to;
    --depth_;
    if (violation[0] == 0) leave_path();
  }

  void leave_path() {
    if (!path_.empty()) path_.pop_back();
  }

  void report() const {
    std::printf("%-22s %9zu states %10zu transitions %5zu deep %5zu ends  %s\n", config_.name,
                seen_.size(), num_transitions_, deepest_, num_ends_,
                violation[0] == 0 ? "ok" : violation);
    std::fflush(stdout);
  }

  Level& top() { return levels_[depth_ - 1]; }

  const Config& config_;
  const bool is_both_ways_;
  std::unordered_map<Print, uint64_t, PrintHash> seen_;
  std::vector<Level> levels_;
  size_t depth_ = 0;
  std::vector<Move> path_;
  size_t num_transitions_ = 0;
  size_t deepest_ = 0;
  size_t num_ends_ = 0;
};

// What happened, from the beginning.
void tell_story(const Config& config, const std::vector<Move>& path) {
  char found[sizeof(violation)];
  std::memcpy(found, violation, sizeof(found));
  begin_world(config);
  is_telling = true;
  for (const Move& move : path) make(move);
  is_telling = false;
  std::printf("=> %s\n", found);
}

// -- the command -------------------------------------------------------------------------------

struct Command {
  Config config;
  bool tells = false;
  bool is_both_ways = false;
};

bool set_text(Config& config, std::string_view key, const char* value) {
  const std::pair<std::string_view, const char**> texts[] = {{"name", &config.name},
                                                             {"groups", &config.groups},
                                                             {"order", &config.order},
                                                             {"script", &config.script}};
  for (const auto& [name, member] : texts) {
    if (name != key) continue;
    *member = value;
    return true;
  }
  return false;
}

bool set_number(Config& config, std::string_view key, const char* value) {
  const std::pair<std::string_view, int*> numbers[] = {
      {"lookahead", &config.lookahead}, {"pieces", &config.num_pieces},
      {"slots", &config.num_slots},     {"depth", &config.depth},
      {"errors", &config.num_errors},   {"agains", &config.num_agains},
      {"flips", &config.num_flips}};
  for (const auto& [name, member] : numbers) {
    if (name != key) continue;
    *member = std::atoi(value);
    return true;
  }
  return false;
}

bool set_word(Config& config, std::string_view word) {
  const std::pair<std::string_view, bool*> flags[] = {{"poison", &config.poison},
                                                      {"early_kernel", &config.early_kernel},
                                                      {"no_pin", &config.no_pin},
                                                      {"polls", &config.polls}};
  for (const auto& [name, member] : flags) {
    if (name == word) return *member = true;
  }
  if (word == "host") config.place = Place::kHost;
  if (word == "direct") config.place = Place::kDirect;
  return word == "host" || word == "direct";
}

bool understand(const char* argument, Command& command) {
  const std::string_view word = argument;
  if (word == "-t") return command.tells = true;
  if (word == "-b") return command.is_both_ways = true;
  const size_t sign = word.find('=');
  if (sign == word.npos) return set_word(command.config, word);
  const std::string_view key = word.substr(0, sign);
  const char* const value = argument + sign + 1;
  return set_text(command.config, key, value) || set_number(command.config, key, value);
}

int run(const Command& command) {
  Search search(command.config, command.is_both_ways);
  if (search.run()) return 0;
  if (command.tells) tell_story(command.config, search.path());
  return 1;
}

// The C++ library keeps what it made for the first number that is printed; not in the block.
void warm_up() { (void)nexus::concat("", 1, int64_t{1}, 1u, size_t{1}); }

}  // namespace
}  // namespace explore

int main(int count, char** arguments) {
  explore::warm_up();
  explore::Command command;
  for (int i = 1; i < count; ++i) {
    if (explore::understand(arguments[i], command)) continue;
    std::fprintf(stderr, "explore: what is %s?\n", arguments[i]);
    return 2;
  }
  return explore::run(command);
}
