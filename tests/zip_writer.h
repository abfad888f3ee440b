// Zip archives for tests, written plainly: local headers, data, directory, end record. Nothing is checked.
#pragma once

#include <zlib.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace sparvar::testing {

class ZipWriter {
 public:
  /// Entries as torch names them: root/data.pkl, root/data/0, ...
  ZipWriter& add(const std::string& name, std::string_view data) {
    listed_ += record("PK\1\2", name, data, true);
    bytes_ += record("PK\3\4", name, data, false);
    bytes_ += data;
    ++count_;
    return *this;
  }
  std::string bytes() const {
    std::string out = bytes_ + listed_ + std::string("PK\5\6\0\0\0\0", 8);
    put(out, count_, 2);
    put(out, count_, 2);
    put(out, listed_.size(), 4);
    put(out, bytes_.size(), 4);
    put(out, 0, 2);
    return out;
  }

 private:
  static void put(std::string& out, std::uint64_t value, int width) {
    for (int i = 0; i < width; ++i) out += static_cast<char>(value >> (8 * i));
  }
  std::string record(std::string_view mark, const std::string& name, std::string_view data, bool listed) const {
    std::string out(mark);
    if (listed) put(out, 20, 2);
    put(out, 20, 2);
    put(out, 0, 2);  // flags
    put(out, 0, 2);  // stored
    put(out, 0, 4);  // time and date
    put(out, ::crc32(0, reinterpret_cast<const Bytef*>(data.data()), static_cast<uInt>(data.size())), 4);
    put(out, data.size(), 4);
    put(out, data.size(), 4);
    put(out, name.size(), 2);
    put(out, 0, 2);
    if (listed) {
      put(out, 0, 2);  // comment
      put(out, 0, 2);  // disk
      put(out, 0, 2);
      put(out, 0, 4);
      put(out, bytes_.size(), 4);
    }
    return out + name;
  }

  std::string bytes_, listed_;
  int count_ = 0;
};

/// A checkpoint whose pickle is `pickle` and whose storage "0" holds `storage`.
inline std::string torch_archive(std::string_view pickle, std::string_view storage) {
  return ZipWriter().add("a/data.pkl", pickle).add("a/byteorder", "little").add("a/data/0", storage).bytes();
}

}  // namespace sparvar::testing
