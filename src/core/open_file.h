// Files that are opened only where they are plain files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

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
  /// The whole file: a std::string, or a std::vector of bytes.
  template <typename Bytes = std::string>
  Bytes read() const {
    Bytes bytes(size_, typename Bytes::value_type{});
    bytes.resize(read_into(bytes.data()));
    return bytes;
  }
  std::shared_ptr<const std::byte> map() const;  // read-only; null where the file is empty

 private:
  std::size_t read_into(void* to) const;  // size() bytes; fewer where the file shrank since it was opened

  std::string path_;
  int descriptor_ = -1;
  std::uint64_t size_ = 0;
};

/// The text of a file of at most `limit` bytes.
std::string read_text(const std::string& path, std::uint64_t limit);

}  // namespace sparvar
