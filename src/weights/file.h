// Files that are opened only where they are plain files, and the JSON in them, checked before it is used.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace sparvar {

/// A plain file open for reading: folders, pipes and devices are refused. Throws Error naming the path and why.
class OpenFile {
 public:
  explicit OpenFile(const std::string& path);
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;
  ~OpenFile();
  const std::string& path() const { return path_; }
  std::uint64_t size() const { return size_; }
  std::string read() const;                      // the whole file
  std::shared_ptr<const std::byte> map() const;  // read-only; null where the file is empty

 private:
  std::string path_;
  int descriptor_ = -1;
  std::uint64_t size_ = 0;
};

/// The text of a file of at most `limit` bytes.
std::string read_text(const std::string& path, std::uint64_t limit);

/// A name from outside as one short printable line, in quotes.
std::string quoted_name(std::string_view name);

/// What a JSON value is, for messages: `a list`, `the text "x"`, `-1`.
std::string describe(const nlohmann::json& value);

/// Strict JSON: UTF-8, no key twice in one object, no deeper than `max_depth`. Throws Error(input) that begins with
/// `where`.
nlohmann::json parse_json(std::string_view text, const std::string& where, int max_depth);

}  // namespace sparvar
