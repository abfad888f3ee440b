#include "interrupt.h"

#include <unistd.h>

#include <csignal>

#include "sparvar/error.h"

namespace sparvar::cli {
namespace {

std::atomic<bool> interrupted{false};
std::atomic<int> last_signal{SIGINT};
static_assert(std::atomic<bool>::is_always_lock_free && std::atomic<int>::is_always_lock_free);  // used in a handler

constexpr int signal_exit_base = 128;

void on_signal(int signal) {
  last_signal.store(signal);
  if (interrupted.exchange(true)) _exit(signal_exit_base + signal);
}

}  // namespace

const std::atomic<bool>* catch_interrupts() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  return &interrupted;
}

void stop_if_interrupted() {
  if (interrupted.load()) throw Error(ErrorKind::cancelled, "stopped");
}

int interrupted_exit_code() { return signal_exit_base + last_signal.load(); }

}  // namespace sparvar::cli
