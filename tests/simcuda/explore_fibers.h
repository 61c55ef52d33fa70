// Threads, locks and memory of a program that is to be explored.
//
// A thread is a fiber here, and stops only where another thread could come in between: before it
// takes a lock, and where it waits. What it does with the lock open, it does at once: the program
// under test shares nothing without the lock. std::thread, std::mutex and std::condition_variable
// are the real ones; beneath them pthread's functions are replaced, so the program under test
// starts its threads and takes its locks as ever.
//
// All that fibers allocate lies in one block, their stacks too. A moment of the whole program is
// therefore a copy of that block, and can be brought back.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace explore {

enum class Wants : uint8_t { kOver, kLock, kNotice, kJoin, kAnswer, kEvent, kIdle };

struct Fiber {
  ucontext_t context;
  void (*body)(void*);
  void* argument;
  std::byte* low;    // its stack is in use from here up
  Wants wants;       // what it waits for; a lock, when nothing else
  const void* what;  // which one
  bool is_noticed;   // the condition it waits for was notified
  bool is_patient;   // without a notice it would wait for ever
  bool holds_turn;   // the next lock follows on what it waited for: nothing can come in between
};

constexpr int kMostFibers = 3;

// While one lives, memory comes from the block. Fibers always allocate there.
class Inside {
 public:
  Inside();
  ~Inside();

 private:
  bool was_inside_;
};

// Empties the block and forgets all fibers.
void begin_program();
// Where the program keeps its state, in the block.
void*& root();

int start_fiber(void (*body)(void*), void* argument);
int num_fibers();
Fiber& fiber(int index);
// -1 outside of all fibers.
int current_fiber();
// Runs the fiber to its next stop.
void step(int index);
// The calling fiber stops here. Whoever runs it again has seen that it may go on.
void stop(Wants wants, const void* what);
// Whether its lock, its notice or its thread is there; the rest is the caller's to know.
bool may_go_on(const Fiber& fiber);

// Called whenever a fiber opens a lock.
extern void (*lock_opened)();

class Moment {
 public:
  void take();
  void bring_back() const;

 private:
  void* reserve(size_t nbytes);

  std::vector<std::byte> bytes_;
  size_t size_ = 0;
};

}  // namespace explore
