// Ctrl-C: the first asks the engine to stop, the second ends the program at once.
#pragma once

#include <atomic>

namespace sparvar::cli {

/// From now on SIGINT and SIGTERM set the flag that is returned.
const std::atomic<bool>* catch_interrupts();

/// Throws Error(cancelled) where one was seen.
void stop_if_interrupted();

/// 128 + the signal's number: 130 for Ctrl-C.
int interrupted_exit_code();

}  // namespace sparvar::cli
