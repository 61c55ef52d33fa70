// The I/O thread's side of the engine: pieces out, bytes in, groups landed.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "common/align.h"
#include "common/clock.h"
#include "common/error.h"
#include "common/unlocked.h"
#include "stream/engine.h"

namespace nexus {
namespace {

// EINTR and EAGAIN are invitations to try again, but not for ever.
constexpr int kMaxAttempts = 64;

// A view is dropped two groups behind the front: nearer re-faults pages still being read, farther
// lets the footprint grow.
constexpr size_t kDropDistance = 2;

bool is_transient(int64_t result) { return result == -EINTR || result == -EAGAIN; }

bool is_direct_refusal(int64_t result) { return result == -EINVAL || result == -EOPNOTSUPP; }

std::string read_error(const File& file, const Piece& piece, int64_t num_read, int64_t result) {
  if (result == 0) {
    return Error("TruncatedCheckpoint",
                 concat("A checkpoint must hold every byte its header promises; ", file.path(),
                        " ends at offset ", piece.window_offset + num_read, ", bytes ",
                        piece.offset, " to ", piece.offset + piece.nbytes,
                        " were expected. The file was cut or its download is incomplete; fetch it "
                        "again."))
        .what();
  }
  return Error("ReadError",
               concat("A read must succeed; ", file.path(), " at offset ", piece.offset, " (",
                      piece.nbytes, " bytes) failed: ", std::strerror(static_cast<int>(-result)),
                      " (errno ", -result, "). Check the disk; the same call may be tried again."))
      .what();
}

}  // namespace

void Engine::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    try {
      const Turn did = turn(lock);
      if (did == Turn::kOver) return;
      if (did == Turn::kIdle) work_.wait(lock);
    } catch (const DeviceLost& lost) {
      lose(lost.what());
    }
  }
}

// As much as can be done without waiting for the caller.
Engine::Turn Engine::turn(std::unique_lock<std::mutex>& lock) {
  drop_left_behind(lock);
  errand_.reset();
  blocked_on_.reset();
  stranded_.reset();
  if (!is_over()) {
    issue();
    if (drop_evicted(lock)) return Turn::kWorked;
  }
  if (errand_) {
    run_errand(arenas_[*errand_], lock);
    return Turn::kWorked;
  }
  if (stranded_) {
    fail_load(arenas_[*stranded_], std::runtime_error(no_more_));
    return Turn::kWorked;
  }
  if (num_in_flight_ > 0) {
    take_completion(lock);
    return Turn::kWorked;
  }
  if (is_over()) return Turn::kOver;
  if (!blocked_on_) return Turn::kIdle;
  ++counters_.num_blocks;
  const Event event = *blocked_on_;
  const Unlocked open(lock);
  device_->block(event);
  return Turn::kWorked;
}

void Engine::take_completion(std::unique_lock<std::mutex>& lock) {
  const Clock::time_point began = Clock::now();
  lock.unlock();
  Request* request = rung_.reader->wait();
  lock.lock();
  --num_in_flight_;
  complete(*std::find_if(chunks_.begin(), chunks_.end(),
                         [request](const Chunk& c) { return &c.request == request; }),
           lock);
  counters_.busy_ns += since_ns(began);
}

// Fills the reader from the queue.
void Engine::issue() {
  for (const size_t index : queue_) {
    while (issue_next(index)) {
    }
  }
}

// Starts the arena's next piece. False when there is none, or no place for it now.
bool Engine::issue_next(size_t arena_index) {
  Arena& arena = arenas_[arena_index];
  // Reads of an older generation may still write here: nothing new before they are back.
  if (arena.state != State::kLoading || arena.stale_in_flight > 0 || !arena.load->has_next()) {
    return false;
  }
  Group& group = group_at(arena.group);
  if (group.stays_in_ram && (group.ram == nullptr || group.ram->is_filled)) {
    if (!errand_) errand_ = arena_index;
    return false;
  }
  // Reads of a load in another arena, which was given up, may still write into the copy in RAM.
  if (group.ram != nullptr && group.num_reading > arena.in_flight) return false;
  if (!has_arrived(arena_index)) return false;
  if (num_in_flight_ >= rung_.reader->depth()) return false;
  if (lands_on_device(group) && !device_->is_done(arena.free)) {
    if (!blocked_on_) blocked_on_ = arena.free;
    return false;
  }
  Chunk* chunk = find_chunk();
  if (chunk == nullptr) return false;
  chunk->is_reading = true;
  chunk->holds_bytes = false;
  chunk->arena = static_cast<int>(arena_index);
  chunk->generation = arena.generation;
  chunk->group = arena.group;
  chunk->load = arena.load;
  chunk->piece = arena.load->take_next();
  chunk->num_read = 0;
  chunk->reached = 0;
  chunk->attempts = 0;
  ++arena.in_flight;
  ++group.num_reading;
  start(*chunk);
  return true;
}

// Whether the next piece's bytes may be read. The others of the queue need not wait for them.
bool Engine::has_arrived(size_t arena_index) {
  const Arena& arena = arenas_[arena_index];
  const Piece& piece = group_at(arena.group).pieces[arena.load->next()];
  const File& file = *files_[static_cast<size_t>(piece.file)];
  if (file.arrived().covers(piece.offset, piece.nbytes)) return true;
  if (!no_more_.empty() && !stranded_) stranded_ = arena_index;
  return false;
}

// A chunk whose slot nobody reads into, copies from or hashes; in turn, so that the first one that
// is still being copied is the one to wait for.
Engine::Chunk* Engine::find_chunk() {
  for (size_t step = 0; step < chunks_.size(); ++step) {
    Chunk& chunk = chunks_[(next_chunk_ + step) % chunks_.size()];
    if (chunk.is_reading) continue;
    if (chunk.holds_bytes && is_current(chunk) && !chunk.load->is_through_with(chunk.piece)) {
      continue;
    }
    if (device_->is_done(chunk.copied)) {
      next_chunk_ = (next_chunk_ + step + 1) % chunks_.size();
      return &chunk;
    }
    if (!blocked_on_) blocked_on_ = chunk.copied;
  }
  return nullptr;
}

// What a load needs besides reads: memory to stay in, or a look at the bytes that stayed there.
void Engine::run_errand(Arena& arena, std::unique_lock<std::mutex>& lock) {
  if (group_at(arena.group).ram == nullptr) return make_ram_copy(arena, lock);
  land_group(arena, lock);
}

// Without room in RAM the group is read whenever it is needed, like others.
void Engine::make_ram_copy(Arena& arena, std::unique_lock<std::mutex>& lock) {
  const int number = arena.group;
  Group& group = group_at(number);
  std::unique_ptr<RamCopy> ram;
  std::string refusal;
  {
    const Unlocked open(lock);
    try {
      ram = std::make_unique<RamCopy>(*device_, group.nbytes, group.ram_phase());
    } catch (const DeviceLost&) {
      throw;
    } catch (const Error& refused) {
      refusal = refused.what();
    }
  }
  if (ram != nullptr) {
    ram_bytes_ += ram->nbytes();
    group.ram = std::move(ram);
    return;
  }
  pin_refusal_ = std::move(refusal);
  group.stays_in_ram = false;
  cut_group(group);
  // What was cut before is not what will be read, wherever the group is on its way to by now.
  Arena& home = arena_of(number);
  if (home.group == number && home.state == State::kLoading) begin(home, number);
}

// Asks for what is still missing of the chunk's window.
void Engine::start(Chunk& chunk) {
  const Piece& piece = piece_of(chunk);
  File& file = *files_[static_cast<size_t>(piece.file)];
  // After a short read, begin again at a boundary that O_DIRECT accepts.
  chunk.num_read = align_down(chunk.num_read, file.alignment().offset);
  chunk.was_direct = file.is_direct();
  chunk.request.file = &file;
  chunk.request.offset = piece.window_offset + chunk.num_read;
  chunk.request.nbytes = piece.window_nbytes - chunk.num_read;
  chunk.request.buffer = window_of(chunk) + chunk.num_read;
  ++counters_.num_reads;
  ++num_in_flight_;
  chunk.range = AsyncRange("read", chunk.request.nbytes);
  rung_.reader->submit(&chunk.request);
}

const Piece& Engine::piece_of(const Chunk& chunk) const {
  return group_at(chunk.group).pieces[chunk.piece];
}

bool Engine::is_current(const Chunk& chunk) const {
  const Arena& arena = arenas_[static_cast<size_t>(chunk.arena)];
  return chunk.generation == arena.generation && arena.state == State::kLoading;
}

// Where the group's first byte belongs, if the processor can write there.
std::byte* Engine::host_landing_of(const Chunk& chunk) const {
  if (const auto& ram = group_at(chunk.group).ram) return ram->data();
  if (!device_->is_host()) return nullptr;
  return arenas_[static_cast<size_t>(chunk.arena)].memory.data;
}

// Where the chunk's read lands: in its slot, or at its place.
std::byte* Engine::window_of(const Chunk& chunk) const {
  const Piece& piece = piece_of(chunk);
  if (piece.staged) return staging_->slot(static_cast<int>(&chunk - chunks_.data()));
  std::byte* landing = host_landing_of(chunk);
  if (landing == nullptr) landing = arenas_[static_cast<size_t>(chunk.arena)].memory.data;
  return landing + piece.group_offset;
}

// A read came back: continue it, land it, or give the load up.
void Engine::complete(Chunk& chunk, std::unique_lock<std::mutex>& lock) {
  chunk.range.end();
  Arena& arena = arenas_[static_cast<size_t>(chunk.arena)];
  const bool is_wanted = is_current(chunk);
  std::string error;
  if (is_wanted && must_continue(chunk, error)) return start(chunk);
  // The disk gets its next request before this answer is copied and hashed, but not before a read
  // that must go on has its place in the queue back.
  if (!is_over()) issue();
  if (!is_wanted) ++counters_.num_stale_reads;
  try {
    if (!error.empty()) throw std::runtime_error(error);
    if (is_wanted) land_piece(chunk, lock);
  } catch (const std::runtime_error& failed) {
    if (is_current(chunk)) fail_load(arena, failed);
  }
  // The arena may have been given another task while the lock was open.
  --(chunk.generation == arena.generation ? arena.in_flight : arena.stale_in_flight);
  --group_at(chunk.group).num_reading;
  chunk.is_reading = false;
  if (is_current(chunk) && arena.load->is_complete()) land_group(arena, lock);
}

// True when the read must be asked for again; `error` is set when it must not.
bool Engine::must_continue(Chunk& chunk, std::string& error) {
  const Piece& piece = piece_of(chunk);
  File& file = *files_[static_cast<size_t>(piece.file)];
  const int64_t result = chunk.request.result;
  if (is_transient(result) && ++chunk.attempts < kMaxAttempts) {
    ++counters_.num_retries;
    return true;
  }
  // All direct reads in flight are refused alike; the first one settles it for the file.
  if (is_direct_refusal(result) && chunk.was_direct) {
    if (file.is_direct()) file.refuse_direct(std::strerror(static_cast<int>(-result)));
    return true;
  }
  if (result <= 0) {
    error = read_error(file, piece, chunk.num_read, result);
    if (result < 0 && external_ != nullptr) error += " " + external_->last_error();
    return false;
  }
  chunk.num_read += result;
  counters_.bytes_read += result;
  // The slack behind the wanted bytes may lie beyond the end of the file.
  if (piece.window_offset + chunk.num_read >= piece.offset + piece.nbytes) return false;
  ++counters_.num_short_reads;
  if (chunk.num_read > chunk.reached) {
    chunk.reached = chunk.num_read;
    return true;
  }
  // Back at a boundary, the same bytes came again: past them there is no file any more.
  if (++chunk.attempts < kMaxAttempts) return true;
  error = read_error(file, piece, chunk.num_read, 0);
  return false;
}

// Moves a staged piece to its place, or on its way there, and hashes what is next in order. For the
// processor's part the lock is open: only this thread writes into arenas.
void Engine::land_piece(Chunk& chunk, std::unique_lock<std::mutex>& lock) {
  const Piece& piece = piece_of(chunk);
  (piece.staged ? counters_.bytes_staged : counters_.bytes_direct) += piece.nbytes;
  const std::byte* bytes = window_of(chunk) + (piece.offset - piece.window_offset);
  std::byte* landing = host_landing_of(chunk);
  if (landing == nullptr) {
    if (!piece.staged) return chunk.load->landed_unseen(chunk.piece);
    Arena& arena = arenas_[static_cast<size_t>(chunk.arena)];
    copy_to_device(arena, bytes, piece.group_offset, piece.nbytes);
    device_->record(chunk.copied, arena.lane);
    chunk.holds_bytes = true;
  }
  const Unlocked open(lock);
  if (landing != nullptr && piece.staged) {
    const Range range("copy", piece.nbytes);
    std::memcpy(landing + piece.group_offset, bytes, static_cast<size_t>(piece.nbytes));
    bytes = landing + piece.group_offset;
  }
  chunk.load->landed(chunk.piece, bytes);
}

// All pieces are there. The group has landed when its files are still what they were and its bytes
// are what they should be.
void Engine::land_group(Arena& arena, std::unique_lock<std::mutex>& lock) {
  const uint64_t generation = arena.generation;
  const std::shared_ptr<Load> load = arena.load;
  Group& group = group_at(arena.group);
  try {
    uint64_t digest = 0;
    {
      const Unlocked open(lock);
      for (const int file : group.files) files_[static_cast<size_t>(file)]->check_unchanged();
      if (load->is_hashed()) digest = digest_of_load(arena, group, *load);
    }
    if (arena.generation != generation) return;
    if (load->is_hashed() && digest != group.digest) return distrust(arena);
    if (load->is_hashed()) {
      group.is_verified = true;
      ++counters_.num_verified;
      if (arena.is_retry) ++counters_.num_healed;
    }
    accept(arena);
  } catch (const std::runtime_error& failed) {
    if (arena.generation == generation) fail_load(arena, failed);
  }
}

// Of the bytes as they arrived; where no processor saw them arrive, of those that lie there now.
uint64_t Engine::digest_of_load(const Arena& arena, const Group& group, const Load& load) const {
  Xxh3 hash;
  if (group.is_in_ram()) {
    for (const Extent& extent : group.extents) {
      hash.update(group.ram->data() + extent.group_offset, static_cast<size_t>(extent.nbytes));
    }
    return hash.digest();
  }
  if (!load.is_unseen()) return load.digest();
  std::vector<std::byte> buffer(static_cast<size_t>(options_.mode.chunk_bytes));
  for (const Piece& piece : group.pieces) {
    device_->fetch(arena.lane, buffer.data(), arena.memory.data + piece.group_offset, piece.nbytes);
    device_->record(arena.ready, arena.lane);
    device_->block(arena.ready);
    hash.update(buffer.data(), static_cast<size_t>(piece.nbytes));
  }
  return hash.digest();
}

// The bytes differ from their digest. Memory, bus and cable may lie once: read again, then believe.
void Engine::distrust(Arena& arena) {
  if (arena.is_retry) {
    const Group& group = group_at(arena.group);
    const Piece& first = group.pieces.front();
    return fail_load(
        arena, Error("CorruptCheckpoint",
                     concat("A group's bytes must match their recorded digest; group ", arena.group,
                            " of ", files_[static_cast<size_t>(first.file)]->path(),
                            " (from offset ", first.offset,
                            ") does not, in two reads. The file or the disk is damaged; fetch the "
                            "file again, or delete the recorded digests if it was changed on "
                            "purpose.")));
  }
  // A copy in RAM that differs is read anew.
  if (const auto& ram = group_at(arena.group).ram) ram->is_filled = false;
  // A view's pages must come from the disk again, not from a spoilt copy.
  if (arena.is_view) drop_pages(group_at(arena.group));
  begin(arena, arena.group);
  arena.is_retry = true;
  queue_.insert(queue_.begin(), static_cast<size_t>(&arena - arenas_.data()));
}

void Engine::drop_pages(const Group& group) const {
  for (const Piece& piece : group.pieces) {
    files_[static_cast<size_t>(piece.file)]->drop(piece.offset, piece.nbytes);
  }
}

// Views left far enough behind give their pages back, unless they are wanted again already.
void Engine::drop_left_behind(std::unique_lock<std::mutex>& lock) {
  if (!options_.mode.trailing_drop) left_behind_.clear();
  while (left_behind_.size() >= kDropDistance) {
    const int group = left_behind_.front();
    left_behind_.erase(left_behind_.begin());
    if (arena_of(group).state != State::kEmpty) continue;
    ++counters_.num_dropped;
    lock.unlock();
    drop_pages(group_at(group));
    lock.lock();
  }
}

// One evicted view, while reads are under way: true when there was one. A read that is still on its
// way there would bring the pages back; who was placed again keeps them.
bool Engine::drop_evicted(std::unique_lock<std::mutex>& lock) {
  for (size_t i = 0; i < evicted_.size(); ++i) {
    const int group = evicted_[i];
    const Arena& arena = arena_of(group);
    if (arena.state == State::kEmpty && arena.stale_in_flight > 0) continue;
    evicted_.erase(evicted_.begin() + static_cast<std::ptrdiff_t>(i));
    if (arena.state != State::kEmpty) return true;
    ++counters_.num_dropped;
    const Unlocked open(lock);
    drop_pages(group_at(group));
    return true;
  }
  return false;
}

}  // namespace nexus
