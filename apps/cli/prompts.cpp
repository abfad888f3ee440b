#include "prompts.h"

#include <fmt/format.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>

#include "core/utf8.h"
#include "sparvar/error.h"

namespace sparvar::cli {
namespace {

constexpr std::size_t largest_file = std::size_t{64} << 20;

/// The whole stream, which may have no end.
std::string read_all(std::istream& in, const std::string& where) {
  std::string text;
  std::array<char, 65536> block{};
  while (in) {
    in.read(block.data(), block.size());
    text.append(block.data(), static_cast<std::size_t>(in.gcount()));
    if (text.size() > largest_file) {
      throw Error(ErrorKind::input,
                  fmt::format("{}: longer than {} MiB, not a list of prompts", where, largest_file >> 20));
    }
  }
  if (in.bad()) throw Error(ErrorKind::system, fmt::format("{}: cannot be read: {}", where, std::strerror(errno)));
  return text;
}

/// Refused here, where file and line are known.
void check_line(const std::string& line, const std::string& where) {
  if (const std::size_t bad = first_invalid_byte(line); bad != std::string::npos)
    throw Error(ErrorKind::input, fmt::format("{}: byte {} is 0x{:02x}, which is not UTF-8; save the file as UTF-8",
                                              where, bad + 1, static_cast<unsigned char>(line[bad])));
  if (const std::size_t nul = line.find('\0'); nul != std::string::npos)
    throw Error(ErrorKind::input, fmt::format("{}: byte {} is a NUL; save the file as UTF-8 text", where, nul + 1));
}

std::vector<std::string> read_lines(std::istream& in, const std::string& where) {
  std::string text = read_all(in, where);
  if (text.starts_with("\xEF\xBB\xBF")) text.erase(0, 3);
  std::vector<std::string> prompts;
  std::istringstream lines(std::move(text));
  int number = 0;
  for (std::string line; std::getline(lines, line);) {
    check_line(line, fmt::format("{}: line {}", where, ++number));
    if (line.ends_with('\r')) line.pop_back();
    if (line.find_first_not_of(" \t") != std::string::npos) prompts.push_back(line);
  }
  if (prompts.empty()) throw Error(ErrorKind::input, fmt::format("{}: holds no prompt; write one a line", where));
  return prompts;
}

}  // namespace

std::vector<std::string> read_prompts(const std::string& path) {
  if (path == "-") return read_lines(std::cin, "standard input");
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) {
    throw Error(ErrorKind::input, fmt::format("{}: is a folder; --file takes a text file, one prompt a line", path));
  }
  std::ifstream in(path, std::ios::binary);
  if (!in) throw Error(ErrorKind::input, fmt::format("{}: cannot be opened: {}", path, std::strerror(errno)));
  return read_lines(in, path);
}

}  // namespace sparvar::cli
