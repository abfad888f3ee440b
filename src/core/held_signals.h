// Signals wait while threads compute.
#pragma once

#include <csignal>

namespace sparvar {

/// While one lives, this thread and every thread that it starts take no signal, but those that instructions raise
/// (SIGSEGV and the like); what came meanwhile is delivered at its end. oneDNN before 3.12 needs it: its compiled f32
/// products keep their stack pointer in a buffer of the heap, where a handler's frame writes over what lies before it
/// (uxlfoundation/oneDNN, issue 4845). Parallel loops hold signals too, since OpenMP's threads inherit it from there.
class HeldSignals {
 public:
  HeldSignals();
  ~HeldSignals();
  HeldSignals(const HeldSignals&) = delete;
  HeldSignals& operator=(const HeldSignals&) = delete;

 private:
  sigset_t before_{};
};

}  // namespace sparvar
