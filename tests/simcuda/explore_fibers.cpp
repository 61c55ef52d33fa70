#include "explore_fibers.h"

#include <pthread.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <type_traits>

namespace explore {

void (*lock_opened)() = [] {};

namespace {

constexpr size_t kHeapBytes = 1 << 20;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kUnit = 16;
constexpr size_t kNumSizes = 256;
// Longer than anybody waits for a notice.
constexpr int64_t kPatienceNs = 1'000'000'000;
// A class's own alignment, beyond the unit; the engine's hash wants a cache line.
constexpr size_t kLine = 64;

struct FreeNode {
  FreeNode* next;
};

// The front of the block: what changes with it.
struct Front {
  size_t heap_used;
  // By size in units, with and without a line's alignment.
  FreeNode* free[2][kNumSizes];
  void* root;
  int num_fibers;
  int current;
  int64_t now_ns;
  Fiber fibers[kMostFibers];
};

alignas(4096) Front front;
alignas(4096) std::byte heap[kHeapBytes];
alignas(4096) std::byte stacks[kMostFibers][kStackBytes];

// Of who steps the fibers; only its place on the stack between two steps.
ucontext_t outside;
bool is_inside = false;

[[noreturn]] void give_up(const char* why) {
  std::fprintf(stderr, "explore: %s\n", why);
  std::abort();
}

bool is_in_heap(const void* at) { return at >= heap && at < heap + kHeapBytes; }

// The size of a block stands in the unit before it.
size_t& units_of(void* at) {
  return *reinterpret_cast<size_t*>(static_cast<std::byte*>(at) - kUnit);
}

void* allocate(size_t nbytes, bool is_line) {
  const size_t units = (nbytes + kUnit - 1) / kUnit;
  if (units < kNumSizes && front.free[is_line][units] != nullptr) {
    FreeNode* const found = front.free[is_line][units];
    front.free[is_line][units] = found->next;
    return found;
  }
  size_t begin = front.heap_used + kUnit;
  if (is_line) begin = (begin + kLine - 1) / kLine * kLine;
  if (begin + units * kUnit > kHeapBytes) give_up("the heap of this world is full");
  front.heap_used = begin + units * kUnit;
  void* const at = heap + begin;
  units_of(at) = units;
  return at;
}

// What is large is rare: it is not used again.
void release(void* at, bool is_line) {
  if (units_of(at) >= kNumSizes) return;
  FreeNode*& first = front.free[is_line][units_of(at)];
  auto* const node = static_cast<FreeNode*>(at);
  node->next = first;
  first = node;
}

void* allocate_anywhere(size_t nbytes, bool is_line) {
  if (is_inside) return allocate(nbytes == 0 ? 1 : nbytes, is_line);
  void* const at = is_line ? std::aligned_alloc(kLine, (nbytes + kLine - 1) / kLine * kLine)
                           : std::malloc(nbytes == 0 ? 1 : nbytes);
  if (at == nullptr) throw std::bad_alloc();
  return at;
}

void release_anywhere(void* at, bool is_line) {
  if (is_in_heap(at)) return release(at, is_line);
  std::free(at);
}

void run_body() {
  const Fiber& self = front.fibers[front.current];
  self.body(self.argument);
  stop(Wants::kOver, nullptr);
}

std::byte* stack_end(int index) { return stacks[index] + kStackBytes; }

}  // namespace

Inside::Inside() : was_inside_(is_inside) { is_inside = true; }
Inside::~Inside() { is_inside = was_inside_; }

void begin_program() {
  std::memset(static_cast<void*>(&front), 0, sizeof(front));
  front.current = -1;
}

void*& root() { return front.root; }
int num_fibers() { return front.num_fibers; }
Fiber& fiber(int index) { return front.fibers[index]; }
int current_fiber() { return front.current; }

int start_fiber(void (*body)(void*), void* argument) {
  if (front.num_fibers == kMostFibers) give_up("too many threads");
  const int index = front.num_fibers++;
  Fiber& self = front.fibers[index];
  self.body = body;
  self.argument = argument;
  getcontext(&self.context);
  self.context.uc_stack.ss_sp = stacks[index];
  self.context.uc_stack.ss_size = kStackBytes;
  self.context.uc_link = nullptr;
  makecontext(&self.context, run_body, 0);
  self.low = stack_end(index) - 1024;
  // It stands before its first lock.
  self.wants = Wants::kLock;
  self.what = nullptr;
  self.holds_turn = true;
  return index;
}

void step(int index) {
  front.current = index;
  {
    const Inside inside;
    swapcontext(&outside, &front.fibers[index].context);
  }
  front.current = -1;
}

void stop(Wants wants, const void* what) {
  Fiber& self = front.fibers[front.current];
  self.wants = wants;
  self.what = what;
  self.is_noticed = false;
  std::byte here;
  // Below this frame there is no more than the call that leaves it.
  self.low = &here - 512;
  if (self.low < stacks[front.current]) give_up("a fiber's stack is full");
  swapcontext(&self.context, &outside);
}

bool may_go_on(const Fiber& fiber) {
  switch (fiber.wants) {
    case Wants::kLock:
      return true;
    case Wants::kNotice:
      return fiber.is_noticed;
    case Wants::kJoin:
      return static_cast<const Fiber*>(fiber.what)->wants == Wants::kOver;
    default:
      return false;
  }
}

void* Moment::reserve(size_t nbytes) {
  if (bytes_.size() < size_ + nbytes) bytes_.resize((size_ + nbytes) * 2);
  void* const at = bytes_.data() + size_;
  size_ += nbytes;
  return at;
}

void Moment::take() {
  size_ = 0;
  std::memcpy(reserve(sizeof(front)), static_cast<const void*>(&front), sizeof(front));
  std::memcpy(reserve(front.heap_used), heap, front.heap_used);
  for (int i = 0; i < front.num_fibers; ++i) {
    const auto used = static_cast<size_t>(stack_end(i) - front.fibers[i].low);
    std::memcpy(reserve(used), front.fibers[i].low, used);
  }
}

void Moment::bring_back() const {
  const std::byte* from = bytes_.data();
  std::memcpy(static_cast<void*>(&front), from, sizeof(front));
  from += sizeof(front);
  std::memcpy(heap, from, front.heap_used);
  from += front.heap_used;
  for (int i = 0; i < front.num_fibers; ++i) {
    const auto used = static_cast<size_t>(stack_end(i) - front.fibers[i].low);
    std::memcpy(front.fibers[i].low, from, used);
    from += used;
  }
}

namespace {

// Whose a mutex is stands in its first word: 0, as it is initialised, for nobody's.
int& owner_of(pthread_mutex_t* mutex) { return *reinterpret_cast<int*>(mutex); }

void lock(pthread_mutex_t* mutex) {
  if (owner_of(mutex) != 0) give_up("a lock was left closed where another thread could run");
  owner_of(mutex) = front.current + 1;
}

// False when it was run without a notice.
bool wait_for_notice(pthread_cond_t* condition, pthread_mutex_t* mutex, bool is_patient) {
  owner_of(mutex) = 0;
  lock_opened();
  Fiber& self = front.fibers[front.current];
  self.is_patient = is_patient;
  stop(Wants::kNotice, condition);
  lock(mutex);
  return self.is_noticed;
}

void notify(const pthread_cond_t* condition, bool all) {
  for (int i = 0; i < front.num_fibers; ++i) {
    Fiber& other = front.fibers[i];
    if (other.wants != Wants::kNotice || other.what != condition || other.is_noticed) continue;
    other.is_noticed = true;
    if (!all) return;
  }
}

void run_thread(void* state) {
  const std::unique_ptr<std::thread::_State> thread(static_cast<std::thread::_State*>(state));
  thread->_M_run();
}

}  // namespace
}  // namespace explore

// -- in place of pthread's ---------------------------------------------------------------------
// Locks of the C++ library itself are taken outside of fibers, or by the one that runs: they are
// always free.

extern "C" {

int pthread_mutex_lock(pthread_mutex_t* mutex) noexcept {
  if (explore::current_fiber() < 0 || !explore::is_in_heap(mutex)) return 0;
  bool& holds_turn = explore::fiber(explore::current_fiber()).holds_turn;
  if (!holds_turn) explore::stop(explore::Wants::kLock, mutex);
  holds_turn = false;
  explore::lock(mutex);
  return 0;
}

int pthread_mutex_unlock(pthread_mutex_t* mutex) noexcept {
  if (explore::current_fiber() < 0 || !explore::is_in_heap(mutex)) return 0;
  explore::owner_of(mutex) = 0;
  explore::lock_opened();
  return 0;
}

int pthread_cond_wait(pthread_cond_t* condition, pthread_mutex_t* mutex) {
  explore::wait_for_notice(condition, mutex, true);
  return 0;
}

int pthread_cond_clockwait(pthread_cond_t* condition, pthread_mutex_t* mutex, clockid_t,
                           const timespec*) {
  if (explore::wait_for_notice(condition, mutex, false)) return 0;
  explore::front.now_ns += explore::kPatienceNs;
  return ETIMEDOUT;
}

int pthread_cond_signal(pthread_cond_t* condition) noexcept {
  explore::notify(condition, false);
  return 0;
}

int pthread_cond_broadcast(pthread_cond_t* condition) noexcept {
  explore::notify(condition, true);
  return 0;
}

pthread_t pthread_self() noexcept { return static_cast<pthread_t>(explore::current_fiber() + 1); }

int pthread_join(pthread_t thread, void**) {
  explore::stop(explore::Wants::kJoin, &explore::fiber(static_cast<int>(thread) - 1));
  return 0;
}

}  // extern "C"

// libstdc++ hands every new thread's work to this function.
void std::thread::_M_start_thread(_State_ptr state, void (*)()) {
  const int index = explore::start_fiber(explore::run_thread, state.release());
  _M_id = id(static_cast<native_handle_type>(index + 1));
}

// -- in place of the C++ library's -------------------------------------------------------------

// Time stands still, except for who waited in vain.
std::chrono::steady_clock::time_point std::chrono::steady_clock::now() noexcept {
  return time_point(nanoseconds(explore::front.now_ns));
}

void* operator new(size_t nbytes) { return explore::allocate_anywhere(nbytes, false); }
void* operator new(size_t nbytes, std::align_val_t) {
  return explore::allocate_anywhere(nbytes, true);
}
void operator delete(void* at) noexcept { explore::release_anywhere(at, false); }
void operator delete(void* at, size_t) noexcept { explore::release_anywhere(at, false); }
void operator delete(void* at, std::align_val_t) noexcept { explore::release_anywhere(at, true); }
void operator delete(void* at, size_t, std::align_val_t) noexcept {
  explore::release_anywhere(at, true);
}
