#include "console.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
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

std::string shell_word(const std::string& word) {
  const auto plain = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || std::string_view("-_./:,").find(c) != std::string::npos;
  };
  if (!word.empty() && std::all_of(word.begin(), word.end(), plain)) return word;
  std::string out = "'";
  for (const char c : word) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
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
