// The engine's beginning and end: files, groups, arenas, reader and ring, and what they are given
// back in.
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <set>
#include <utility>

#include "common/bounds.h"
#include "common/error.h"
#include "io/reader_split.h"
#include "stream/engine.h"

namespace nexus {
namespace {

// What a disk that writes into a device's memory wants: pages of the file. Where their place on the
// device begins in mid-page it is slower, and as right.
constexpr Alignment kDeviceAlignment = {.memory = 1, .offset = 4096};

// One that is read into, one that is copied from, one that is waited for.
constexpr int kFewestSlots = 3;

// A pool has more arenas than a GPU runs queues side by side (its hardware has 32): more lanes than
// that wait for each other anyway.
constexpr size_t kMostPoolLanes = 32;

// Half as many slots again as reads in flight: while one answer is copied out, the queue stays
// full.
int num_slots(int depth) { return depth + depth / 2; }

void check_order(const std::vector<int>& order, const std::vector<GroupSpec>& groups) {
  std::set<int> seen;
  for (const int group : order) {
    if (!is_index(group, groups.size()) || !seen.insert(group).second) {
      fail("EngineError", "The order names groups in [0, ", groups.size(), "), each once; got ",
           group, ".");
    }
    if (groups[static_cast<size_t>(group)].is_pooled) {
      fail("EngineError", "Group ", group, " is pooled: it is placed, and in no order.");
    }
  }
}

// The arenas that are no group's own.
std::vector<bool> find_pool(const std::vector<GroupSpec>& groups, size_t num_arenas) {
  std::vector<bool> is_pool(num_arenas, true);
  for (const GroupSpec& spec : groups) {
    if (!spec.is_pooled) is_pool[static_cast<size_t>(spec.arena)] = false;
  }
  for (const GroupSpec& spec : groups) {
    if (spec.is_pooled && !is_pool[static_cast<size_t>(spec.arena)]) {
      fail("EngineError", "Pooled groups share arenas with each other only; arena ", spec.arena,
           " belongs to another group.");
    }
  }
  return is_pool;
}

bool lies_in(const std::byte* data, const File& file) {
  return file.mapping() != nullptr && data >= file.mapping() && data < file.mapping() + file.size();
}

}  // namespace

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
  check_order(order, groups);
  const std::vector<bool> is_pool = find_pool(groups, arenas.size());
  for (size_t i = 0; i < arenas.size(); ++i) add_arena(std::move(arenas[i]), is_pool[i]);
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

void Engine::add_arena(ArenaMemory memory, bool is_pool) {
  Arena& arena = arenas_.emplace_back();
  arena.memory = std::move(memory);
  arena.is_pool = is_pool;
  arena.is_view = std::any_of(files_.begin(), files_.end(),
                              [&](const auto& file) { return lies_in(arena.memory.data, *file); });
  if (!arena.is_view) device_->prepare(arena.memory.data, arena.memory.nbytes);
  arena.lane = is_pool ? make_pool_lane() : device_->make_lane();
  arena.ready = device_->make_event();
  arena.free = device_->make_event();
  // An allocator gives out memory that work enqueued earlier may still read.
  device_->record(arena.free, device_->current());
}

Lane Engine::make_pool_lane() {
  if (pool_lanes_.size() == kMostPoolLanes) return pool_lanes_[arenas_.size() % kMostPoolLanes];
  return pool_lanes_.emplace_back(device_->make_lane());
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
  group.is_streamed = group.is_pooled = spec.is_pooled;
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
  // A device's ring is as large as its rates want it; elsewhere slots only bridge a copy.
  int count = num_slots(rung_.reader->depth());
  if (staging_ != nullptr) {
    count = device_->is_host() ? std::min(count, staging_->num_slots()) : staging_->num_slots();
  }
  chunks_.resize(static_cast<size_t>(count));
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
    if (arena.is_pool) placed_.push_back(index_of(arena));
    begin(arena, arena.group);
  }
  schedule();
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
