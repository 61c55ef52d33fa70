#include "explore_caller.h"

#include <cctype>
#include <cstring>
#include <exception>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "explore_engine.h"
#include "explore_fibers.h"

namespace explore {
namespace {

// A step is a letter and a group. Without a letter: acquire it, and compute with it.
//
//   h2  acquire, held        k2  compute with it once more     r2  release
//   c2  acquire on a clone   w2  write the clone back, as a compiled graph may at its end
//   s2  wait for a resident  d   set the digests; verify        e   end the pass      x   close
//   t1  compute on the other stream from here on, which knows nothing of the one before
struct Step {
  char what;
  int group;
};

// Outside of the block: they stay what they are.
std::vector<nexus::GroupSpec> specs;
std::vector<Step> steps;
std::vector<int> order;

std::vector<std::string> words_of(const char* text) {
  std::istringstream in(text);
  std::vector<std::string> words;
  for (std::string word; in >> word;) words.push_back(word);
  return words;
}

void parse_groups(const Config& config) {
  specs.clear();
  for (const std::string& word : words_of(config.groups)) {
    const auto number = static_cast<int64_t>(specs.size());
    const int64_t nbytes = group_nbytes();
    specs.push_back({.arena = word[0] - '0',
                     .nbytes = nbytes,
                     .is_brief = word.find('B') != std::string::npos,
                     .stays_in_ram = word.find('R') != std::string::npos,
                     .extents = {{0, number * nbytes, nbytes, 0}}});
  }
}

void parse_script(const Config& config) {
  steps.clear();
  for (const std::string& word : words_of(config.script)) {
    const bool has_letter = std::isalpha(static_cast<unsigned char>(word[0])) != 0;
    const std::string rest = has_letter ? word.substr(1) : word;
    steps.push_back({has_letter ? word[0] : 'a', rest.empty() ? -1 : std::stoi(rest)});
  }
}

int num_arenas() {
  int count = 0;
  for (const nexus::GroupSpec& spec : specs) count = std::max(count, spec.arena + 1);
  return count;
}

nexus::EngineOptions options_of(const Config& config) {
  nexus::EngineOptions options;
  options.mode.chunk_bytes = unit();
  options.mode.depth = config.depth;
  options.mode.trailing_drop = false;
  options.poison = config.poison;
  options.num_slots = config.num_slots;
  return options;
}

void attach_engine() {
  Machine& now = machine();
  std::vector<std::unique_ptr<nexus::File>> files;
  files.push_back(std::make_unique<nexus::File>("disk", nexus::Stamp()));
  now.engine = new nexus::Engine(std::move(files), make_device(), options_of(*now.config));
  std::vector<nexus::ArenaMemory> arenas;
  for (int i = 0; i < num_arenas(); ++i) {
    arenas.push_back({nullptr, arena_memory(i), group_nbytes()});
    if (now.config->early_kernel) enqueue_kernel(arena_memory(i), 0, -1);
  }
  now.engine->attach(std::move(arenas), specs, order, now.config->lookahead);
}

std::byte* arena_of(int group) { return arena_memory(specs[static_cast<size_t>(group)].arena); }

// Of memory of the caller's own, the generation says nothing.
void compute(int group, const std::byte* at) {
  enqueue_kernel(at, nexus::Explorer::generation(*machine().engine, arena_at(at)), group);
  // A processor computes here and now; others may run meanwhile.
  if (machine().config->place == Place::kHost) stop(Wants::kIdle, nullptr);
}

// A read that failed is asked for again, as often as the disk fails.
void acquire(int group, std::byte* at, bool hold) {
  while (true) {
    ++machine().num_acquired;
    tell("  caller: acquire group %d", group);
    try {
      machine().engine->acquire(group, at, group_nbytes(), hold);
      return;
    } catch (const std::exception& error) {
      const bool is_meant = std::strstr(error.what(), "nexus:ReadError") != nullptr;
      tell("  caller: %s", error.what());
      if (is_meant && std::exchange(machine().has_failed[group], false)) continue;
      violate("acquire of group %d threw %s", group, error.what());
      return;
    }
  }
}

void verify() {
  std::vector<uint64_t> digests;
  for (const nexus::GroupSpec& spec : specs) {
    nexus::Xxh3 hash;
    for (int64_t i = 0; i < spec.nbytes; ++i) {
      const auto byte = static_cast<uint8_t>(1 + (spec.extents[0].offset + i) / unit());
      hash.update(&byte, 1);
    }
    digests.push_back(hash.digest());
  }
  machine().engine->set_digests(digests, nexus::Verify::kAlways);
}

// Its bytes are there, and not only on their way.
void wait_for_resident(int group) {
  ++machine().num_acquired;
  machine().engine->wait_resident(group);
  look(arena_of(group), group);
}

// Afterwards all memory may be given back.
void close_engine() {
  machine().engine->close();
  if (!is_at_rest()) violate("closed while reads or copies are under way");
}

void take(const Step& step) {
  nexus::Engine& engine = *machine().engine;
  std::byte* const clone = clone_memory(std::max(0, step.group));
  switch (step.what) {
    case 'a':
    case 'h':
      acquire(step.group, arena_of(step.group), step.what == 'h');
      return compute(step.group, arena_of(step.group));
    case 'k':
      return compute(step.group, arena_of(step.group));
    case 'r':
      return engine.release(step.group);
    case 'c':
      acquire(step.group, clone, false);
      return compute(step.group, clone);
    case 'w':
      return enqueue_write_back(arena_of(step.group), clone);
    case 's':
      return wait_for_resident(step.group);
    case 't':
      machine().stream = static_cast<size_t>(step.group);
      return;
    case 'd':
      return verify();
    case 'e':
      return engine.end_pass(nexus::this_caller());
    case 'x':
      return close_engine();
    default:
      violate("the script has no step %c", step.what);
  }
}

void run_caller(void*) {
  attach_engine();
  for (const Step& step : steps) {
    ++machine().num_steps;
    tell("  caller: step %d, %c%d", machine().num_steps, step.what, step.group);
    try {
      take(step);
    } catch (const std::exception& error) {
      violate("step %c%d threw %s", step.what, step.group, error.what());
    }
  }
}

void note_open_lock() {
  if (machine().engine == nullptr) return;
  nexus::Explorer::note_window(*machine().engine, machine().windows[current_fiber()]);
}

}  // namespace

void begin_world(const Config& config) {
  violation[0] = 0;
  begin_program();
  lock_opened = note_open_lock;
  {
    const Inside inside;
    root() = new Machine{.config = &config};
    machine().lanes.resize(kNumStreams);
    machine().memory.resize(static_cast<size_t>((kMostArenas + kMostGroups) * group_nbytes()));
  }
  parse_groups(config);
  parse_script(config);
  order.clear();
  for (const std::string& word : words_of(config.order)) order.push_back(std::stoi(word));
  start_fiber(run_caller, nullptr);
}

}  // namespace explore
