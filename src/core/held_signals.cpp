#include "core/held_signals.h"

#include <pthread.h>

#include <initializer_list>

namespace sparvar {

HeldSignals::HeldSignals() {
  sigset_t held;
  sigfillset(&held);
  for (const int raised : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT}) sigdelset(&held, raised);
  pthread_sigmask(SIG_BLOCK, &held, &before_);
}

HeldSignals::~HeldSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

}  // namespace sparvar
