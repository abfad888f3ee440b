// Between the engine, which runs without the GIL, and Python.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>

#include "bindings.h"

namespace sparvar::python {

/// Calls Python from inside a run, looks for Ctrl-C, and keeps what Python raised until the engine has stopped: no
/// Python exception passes through the engine. Used by the thread that runs.
class Bridge {
 public:
  const std::atomic<bool>* cancel() const { return &cancel_; }
  bool failed() const { return failure_ != nullptr; }
  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

  /// Calls back with the GIL; after a failure nothing more is called.
  template <typename Body>
  void call(Body&& body) {
    if (failure_) return;
    const nb::gil_scoped_acquire gil;
    last_look_ = Clock::now();
    try {
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
      body();
    } catch (...) {
      failure_ = std::current_exception();
      cancel_.store(true);
    }
  }
  /// Has Ctrl-C been pressed? Ten times a second at most: another thread may hold the GIL for a while.
  void look() {
    if (Clock::now() - last_look_ > std::chrono::milliseconds(100)) call([] {});
  }

 private:
  using Clock = std::chrono::steady_clock;
  std::atomic<bool> cancel_{false};
  std::exception_ptr failure_;
  Clock::time_point last_look_ = Clock::now();
};

}  // namespace sparvar::python
