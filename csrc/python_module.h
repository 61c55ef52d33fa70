// The little of Python that native code needs, in the limited API: a module to import, a look for
// Ctrl-C while a caller waits, and a note for callers that lose errors.
#pragma once

#include <string>

namespace nexus {

// Runs pending signal handlers in the calling thread, if it is Python's main one. True when one of
// them raised; the exception is kept for `nexus_ext._native.take_interrupt()`.
bool check_python_signals();

// Keeps the text of an error for `nexus_ext._native.take_failure()` in the calling thread. Code
// that AOTInductor of torch 2.11 generated goes on after an op has failed.
void note_failure(const std::string& text);

}  // namespace nexus
