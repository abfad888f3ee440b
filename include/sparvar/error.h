// The one exception type of the library.
#pragma once

#include <stdexcept>
#include <string>

namespace sparvar {

enum class ErrorKind {
  usage,     // the caller asked for something that cannot be (exit code 2)
  input,     // a file or tensor is not what it should be
  system,    // memory, disk, permissions
  cancelled  // the caller's cancel flag was seen
};

/// Every failure of the library. `what()` is one line for people: what is wrong, where, what to do.
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace sparvar
