#include "console.h"

#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "sparvar/error.h"

namespace sparvar::cli {

void print_error(std::string_view message) {
  // Without an allocation: memory may be what is missing.
  std::array<char, 512> part{};
  std::size_t filled = 0;
  const auto put = [&](char c) {
    part[filled++] = c;
    if (filled < part.size()) return;
    std::fwrite(part.data(), 1, filled, stderr);
    filled = 0;
  };
  for (const char c : std::string_view("sparvar: ")) put(c);
  for (const char c : message) {
    const auto byte = static_cast<unsigned char>(c);
    put(byte < 0x20 || byte == 0x7F ? ' ' : c);
  }
  put('\n');
  std::fwrite(part.data(), 1, filled, stderr);
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
