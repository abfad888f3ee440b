// Zip archives whose entries are stored without compression, memory-mapped: the outside of torch's checkpoints.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>

namespace sparvar {

struct ZipEntry {
  std::uint64_t begin = 0;  // of the data, in the file
  std::uint64_t size = 0;
  std::uint32_t crc32 = 0;
};

class ZipArchive {
 public:
  /// Reads and checks the directory; zip64 is understood. Refused with Error(input): compressed and encrypted entries,
  /// entries that overlap, leave the file or come twice, and headers that do not say what the directory says.
  static ZipArchive open(const std::string& path);

  const std::string& path() const { return path_; }
  const std::map<std::string, ZipEntry>& entries() const { return entries_; }
  /// Null where there is none of this name.
  const ZipEntry* find(const std::string& name) const;
  /// The bytes of an entry, on the mapped pages that `mapping()` keeps.
  std::span<const std::byte> bytes(const ZipEntry& entry) const { return {map_.get() + entry.begin, entry.size}; }
  const std::shared_ptr<const std::byte>& mapping() const { return map_; }
  /// Reads the entry, once, and compares its checksum. Throws Error(input) where it differs. Not for two threads.
  void verify(const std::string& name) const;

 private:
  std::string path_;
  std::shared_ptr<const std::byte> map_;
  std::map<std::string, ZipEntry> entries_;
  mutable std::set<std::string> verified_;
};

}  // namespace sparvar
