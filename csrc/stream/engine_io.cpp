// The I/O thread's side of the engine: pieces out, bytes in, groups landed.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "common/align.h"
#include "common/error.h"
#include "stream/engine.h"

namespace nexus {
namespace {

using Clock = std::chrono::steady_clock;

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
    drop_left_behind(lock);
    if (!is_closing_) issue();
    if (num_in_flight_ == 0) {
      if (is_closing_) return;
      work_.wait(lock);
      continue;
    }
    const Clock::time_point began = Clock::now();
    lock.unlock();
    Request* request = rung_.reader->wait();
    lock.lock();
    --num_in_flight_;
    complete(*std::find_if(chunks_.begin(), chunks_.end(),
                           [request](const Chunk& c) { return &c.request == request; }),
             lock);
    counters_.busy_ns +=
        std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - began).count();
  }
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
  if (num_in_flight_ >= rung_.reader->depth()) return false;
  const auto chunk = std::find_if(chunks_.begin(), chunks_.end(),
                                  [](const Chunk& candidate) { return !candidate.is_busy; });
  if (chunk == chunks_.end()) return false;
  chunk->is_busy = true;
  chunk->arena = static_cast<int>(arena_index);
  chunk->generation = arena.generation;
  chunk->group = arena.group;
  chunk->load = arena.load;
  chunk->piece = arena.load->take_next();
  chunk->num_read = 0;
  chunk->reached = 0;
  chunk->attempts = 0;
  ++arena.in_flight;
  start(*chunk);
  return true;
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
  rung_.reader->submit(&chunk.request);
}

const Piece& Engine::piece_of(const Chunk& chunk) const {
  return group_at(chunk.group).pieces[chunk.piece];
}

// Where the chunk's read lands: in its slot, or at its place in the arena.
std::byte* Engine::window_of(const Chunk& chunk) const {
  const Piece& piece = piece_of(chunk);
  if (piece.staged) return staging_->slot(static_cast<int>(&chunk - chunks_.data()));
  return arenas_[static_cast<size_t>(chunk.arena)].memory.data + piece.group_offset;
}

// A read came back: continue it, land it, or give the load up.
void Engine::complete(Chunk& chunk, std::unique_lock<std::mutex>& lock) {
  Arena& arena = arenas_[static_cast<size_t>(chunk.arena)];
  const bool is_current = chunk.generation == arena.generation && arena.state == State::kLoading;
  std::string error;
  if (is_current && must_continue(chunk, error)) return start(chunk);
  // The disk gets its next request before this answer is copied and hashed, but not before a read
  // that must go on has its place in the queue back.
  if (!is_closing_) issue();
  if (!is_current) {
    ++counters_.num_stale_reads;
  } else if (error.empty()) {
    land_piece(chunk, lock);
  } else {
    fail_load(arena, std::move(error));
  }
  // The arena may have been given another task while the lock was open.
  --(chunk.generation == arena.generation ? arena.in_flight : arena.stale_in_flight);
  chunk.is_busy = false;
  if (chunk.generation == arena.generation && arena.state == State::kLoading &&
      arena.load->is_complete()) {
    land_group(arena, lock);
  }
  chunk.load.reset();
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

// Copies a staged piece to its place. The lock is open meanwhile: only this thread writes arenas.
void Engine::land_piece(Chunk& chunk, std::unique_lock<std::mutex>& lock) {
  const Piece& piece = piece_of(chunk);
  std::byte* base = arenas_[static_cast<size_t>(chunk.arena)].memory.data;
  const std::byte* window = window_of(chunk);
  (piece.staged ? counters_.bytes_staged : counters_.bytes_direct) += piece.nbytes;
  lock.unlock();
  if (piece.staged) {
    device_->copy(base + piece.group_offset, window + (piece.offset - piece.window_offset),
                  piece.nbytes);
  }
  chunk.load->landed(chunk.piece, base);
  lock.lock();
}

// All pieces are there. The group has landed when its files are still what they were and its bytes
// are what they should be.
void Engine::land_group(Arena& arena, std::unique_lock<std::mutex>& lock) {
  const uint64_t generation = arena.generation;
  const std::shared_ptr<Load> load = arena.load;
  Group& group = group_at(arena.group);
  lock.unlock();
  std::string error;
  try {
    for (const int file : group.files) files_[static_cast<size_t>(file)]->check_unchanged();
  } catch (const Error& changed) {
    error = changed.what();
  }
  lock.lock();
  if (arena.generation != generation) return;
  if (!error.empty()) return fail_load(arena, std::move(error));
  if (load->is_hashed() && load->digest() != group.digest) return distrust(arena);
  if (load->is_hashed()) {
    group.is_verified = true;
    ++counters_.num_verified;
    if (arena.is_retry) ++counters_.num_healed;
  }
  arena.state = State::kLanded;
  ++counters_.num_landed;
  landed_.notify_all();
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
                            "purpose."))
                   .what());
  }
  // A view's pages must come from the disk again, not from a spoilt copy.
  if (arena.is_view) drop_pages(group_at(arena.group));
  begin(arena, arena.group);
  arena.is_retry = true;
  queue_.insert(queue_.begin(), static_cast<size_t>(&arena - arenas_.data()));
}

void Engine::fail_load(Arena& arena, std::string error) {
  arena.state = State::kFailed;
  arena.error = std::move(error);
  ++counters_.num_failed;
  landed_.notify_all();
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

}  // namespace nexus
