// The little of Python that native code needs, in the limited API: a module to import, and a look
// for Ctrl-C while a caller waits.
#pragma once

namespace nexus {

// Runs pending signal handlers in the calling thread, if it is Python's main one. True when one of
// them raised; the exception is kept for `nexus_ext._native.take_interrupt()`.
bool check_python_signals();

}  // namespace nexus
