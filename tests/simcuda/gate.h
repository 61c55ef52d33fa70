// The gate that every driver call passes: the log, injected failures, and the rules of CUDA that
// hold for all calls. To add a call, write in any calls_*.cpp
//
//   CUDA(cuName)(int argument) {
//     return call(__func__, Needs::kContext, [&](Call& in) -> CUresult { return kSuccess; });
//   }
#pragma once

#include <functional>
#include <string>

#include "world.h"

namespace simcuda {

enum class Needs {
  kNothing,  // answers always: it is how errors are described
  kLibrary,  // answers before cuInit
  kDriver,   // cuInit
  kContext,  // a current context
};

// One call, with the world locked.
struct Call {
  Lock& lock;
  Thread& thread;
  int device = 0;  // of the current context, where the call needs one

  StreamPtr stream(CUstream handle) const;  // null: no such stream, counted
  EventPtr event(CUevent handle) const;     // null: no such event, counted
};

CUcontext context_of(int device);

using Body = std::function<CUresult(Call& in)>;

CUresult call(const char* name, Needs needs, const Body& body);

// A call that lets something go. Once a context is lost it returns the code as all do, and lets go
// nevertheless: nothing is left to hold, and tests still see who forgot to.
CUresult release_call(const char* name, Needs needs, const Body& body);

// Counts the call; the code of a failure that a test wants here, or success.
CUresult injected_failure(const char* name, bool is_driver);

// Is this wait, record or query to be left out, as if the program under test had forgotten it?
bool is_dropped(const std::string& what);

// False if the text is not a list of "word" and "word#number".
bool set_drops(const std::string& text);

}  // namespace simcuda
