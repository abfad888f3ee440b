#include "console.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "sparvar/error.h"

namespace sparvar::cli {

void print_error(std::string_view message) {
  std::string line(message);
  for (char& c : line) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7F) c = ' ';
  }
  line = "sparvar: " + line + "\n";
  std::fwrite(line.data(), 1, line.size(), stderr);
}

void print_aside(std::string_view line) {
  std::fwrite(line.data(), 1, line.size(), stderr);
  std::fputc('\n', stderr);
}

namespace {

[[noreturn]] void stdout_failed() {
  throw Error(ErrorKind::system, fmt::format("standard output: cannot be written: {}", std::strerror(errno)));
}

}  // namespace

void print(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) stdout_failed();
}

void flush_stdout() {
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) stdout_failed();
}

bool stderr_is_terminal() { return isatty(STDERR_FILENO) == 1; }

}  // namespace sparvar::cli
