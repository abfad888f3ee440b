// Layout of the records: PKWARE's APPNOTE.TXT, 4.3 and 4.5.3 (zip64).
#include "weights/zip_archive.h"

#include <fmt/format.h>
#include <zlib.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string_view>
#include <vector>

#include "core/open_file.h"
#include "sparvar/error.h"
#include "weights/strict_json.h"

namespace sparvar {
namespace {

constexpr std::uint32_t kLocalHeader = 0x04034b50, kDirectoryHeader = 0x02014b50, kDescriptor = 0x08074b50;
constexpr std::uint32_t kEnd = 0x06054b50, kEnd64 = 0x06064b50, kLocator64 = 0x07064b50;
constexpr std::uint64_t kLocalSize = 30, kDirectorySize = 46, kEndSize = 22, kEnd64Size = 56, kLocatorSize = 20;
constexpr std::uint64_t kLongestComment = 0xffff;
constexpr std::uint32_t kIn64 = 0xffffffff;  // the number is in the zip64 field
constexpr unsigned kSizesFollow = 1U << 3, kUtf8 = 1U << 11;

/// The bytes of a file, never read past its end.
class Bytes {
 public:
  Bytes(std::string path, const std::byte* data, std::uint64_t size)
      : path_(std::move(path)), data_(data), size_(size) {}
  std::uint64_t size() const { return size_; }
  bool holds(std::uint64_t at, std::uint64_t count) const { return at <= size_ && count <= size_ - at; }
  template <typename T>
  T read(std::uint64_t at) const {
    if (!holds(at, sizeof(T))) fail(fmt::format("a record at byte {} passes the end (was the file cut short?)", at));
    T value;
    std::memcpy(&value, data_ + at, sizeof value);
    return value;
  }
  std::string_view text(std::uint64_t at, std::uint64_t count) const {
    if (!holds(at, count)) fail(fmt::format("a record at byte {} passes the end (was the file cut short?)", at));
    return {reinterpret_cast<const char*>(data_) + at, count};
  }
  [[noreturn]] void fail(const std::string& what) const { throw Error(ErrorKind::input, path_ + ": zip: " + what); }

 private:
  std::string path_;
  const std::byte* data_;
  std::uint64_t size_;
};

/// Where the directory lies and how many entries it has.
struct Directory {
  std::uint64_t begin = 0, end = 0, entries = 0;
};

std::uint64_t find_end(const Bytes& bytes) {
  if (bytes.size() >= kEndSize)
    for (std::uint64_t comment = 0; comment <= std::min(kLongestComment, bytes.size() - kEndSize); ++comment) {
      const std::uint64_t at = bytes.size() - kEndSize - comment;
      if (bytes.read<std::uint32_t>(at) == kEnd && bytes.read<std::uint16_t>(at + 20) == comment) return at;
    }
  bytes.fail("no end record (was the file cut short?)");
}

Directory find_directory(const Bytes& bytes) {
  const std::uint64_t end = find_end(bytes);
  Directory directory;
  const auto entries = bytes.read<std::uint16_t>(end + 10);
  const auto size = bytes.read<std::uint32_t>(end + 12);
  const auto begin = bytes.read<std::uint32_t>(end + 16);
  directory.entries = entries;
  directory.begin = begin;
  std::uint64_t length = size;
  directory.end = end;
  if (end >= kLocatorSize && bytes.read<std::uint32_t>(end - kLocatorSize) == kLocator64) {
    const std::uint64_t locator = end - kLocatorSize;
    const auto at = bytes.read<std::uint64_t>(locator + 8);
    if (!bytes.holds(at, kEnd64Size) || bytes.read<std::uint32_t>(at) != kEnd64 ||
        bytes.read<std::uint64_t>(at + 4) != locator - at - 12)
      bytes.fail(fmt::format("the zip64 end record is not at byte {}, where it should be", at));
    directory.entries = bytes.read<std::uint64_t>(at + 32);
    length = bytes.read<std::uint64_t>(at + 40);
    directory.begin = bytes.read<std::uint64_t>(at + 48);
    directory.end = at;
    if ((entries != 0xffff && entries != directory.entries) || (size != kIn64 && size != length) ||
        (begin != kIn64 && begin != directory.begin))
      bytes.fail("the two end records differ");
  }
  if (directory.begin > directory.end || directory.end - directory.begin != length)
    bytes.fail(fmt::format("a directory of {} bytes at byte {} does not end at byte {}, where the end record is",
                           length, directory.begin, directory.end));
  if (directory.entries > length / kDirectorySize)
    bytes.fail(fmt::format("{} entries cannot be in a directory of {} bytes", directory.entries, length));
  return directory;
}

/// What a header says of one entry, in the directory or before the data.
struct Header {
  unsigned flags = 0, method = 0;
  std::uint32_t crc = 0;
  std::uint64_t stored = 0, size = 0, offset = 0;
};

/// Replaces the numbers that did not fit by those of the zip64 field.
void read_zip64(const Bytes& bytes, std::uint64_t at, std::uint64_t length, Header& header) {
  for (const std::uint64_t end = at + length; end - at >= 4;) {
    const auto id = bytes.read<std::uint16_t>(at);
    const auto size = bytes.read<std::uint16_t>(at + 2);
    at += 4;
    if (size > end - at) return;  // torch fills its padding field without care
    if (id == 1) {
      std::uint64_t left = size, from = at;
      for (std::uint64_t* number : {&header.size, &header.stored, &header.offset}) {
        if (*number != kIn64 || left < 8) continue;
        *number = bytes.read<std::uint64_t>(from);
        from += 8;
        left -= 8;
      }
      return;
    }
    at += size;
  }
}

struct Named {
  std::string name;
  Header header;
  ZipEntry entry;
  std::uint64_t end = 0;  // of what belongs to the entry
};

void check_local(const Bytes& bytes, std::uint64_t limit, Named& entry) {
  const auto fail = [&](const std::string& what) {
    bytes.fail(fmt::format("entry {}: {}", quoted_name(entry.name), what));
  };
  const Header& listed = entry.header;
  const std::uint64_t at = listed.offset;
  if (at > limit || limit - at < kLocalSize)
    fail(fmt::format("its header at byte {} is not in front of the directory", at));
  if (bytes.read<std::uint32_t>(at) != kLocalHeader) fail(fmt::format("no header at byte {}", at));
  Header local;
  local.flags = bytes.read<std::uint16_t>(at + 6);
  local.method = bytes.read<std::uint16_t>(at + 8);
  local.crc = bytes.read<std::uint32_t>(at + 14);
  local.stored = bytes.read<std::uint32_t>(at + 18);
  local.size = bytes.read<std::uint32_t>(at + 22);
  const auto name = bytes.read<std::uint16_t>(at + 26);
  const auto extra = bytes.read<std::uint16_t>(at + 28);
  const std::uint64_t begin = at + kLocalSize + name + extra;
  if (begin > limit || listed.size > limit - begin)
    fail(fmt::format("{} bytes from byte {} pass the directory at byte {}", listed.size, begin, limit));
  read_zip64(bytes, at + kLocalSize + name, extra, local);
  const bool follow = (local.flags & kSizesFollow) != 0;
  const auto fits = [&](std::uint64_t here, std::uint64_t there) { return here == there || (follow && here == 0); };
  if (bytes.text(at + kLocalSize, name) != entry.name || local.flags != listed.flags || local.method != listed.method ||
      !fits(local.crc, listed.crc) || !fits(local.stored, listed.stored) || !fits(local.size, listed.size))
    fail("its header does not say what the directory says");
  entry.entry = {begin, listed.size, listed.crc};
  entry.end = begin + listed.size;
  if (!follow) return;
  // Checksum and sizes behind the data, of 4 or of 8 bytes.
  const std::uint64_t sum = entry.end + 4;
  const auto described = [&](std::uint64_t width) {
    if (limit < sum || limit - sum < 4 + 2 * width) return false;
    const auto number = [&](std::uint64_t from) {
      return width == 8 ? bytes.read<std::uint64_t>(from) : bytes.read<std::uint32_t>(from);
    };
    return bytes.read<std::uint32_t>(entry.end) == kDescriptor && bytes.read<std::uint32_t>(sum) == listed.crc &&
           number(sum + 4) == listed.stored && number(sum + 4 + width) == listed.size;
  };
  if (described(8))
    entry.end = sum + 4 + 16;
  else if (described(4))
    entry.end = sum + 4 + 8;
  else
    fail("what follows its data does not say what the directory says");
}

/// The entry at `at` of the directory; `at` moves behind it.
Named read_listed(const Bytes& bytes, const Directory& directory, std::uint64_t& at) {
  if (directory.end - at < kDirectorySize || bytes.read<std::uint32_t>(at) != kDirectoryHeader)
    bytes.fail(fmt::format("no directory entry at byte {}", at));
  Named entry;
  Header& header = entry.header;
  header.flags = bytes.read<std::uint16_t>(at + 8);
  header.method = bytes.read<std::uint16_t>(at + 10);
  header.crc = bytes.read<std::uint32_t>(at + 16);
  header.stored = bytes.read<std::uint32_t>(at + 20);
  header.size = bytes.read<std::uint32_t>(at + 24);
  const auto name = bytes.read<std::uint16_t>(at + 28);
  const auto extra = bytes.read<std::uint16_t>(at + 30);
  const auto comment = bytes.read<std::uint16_t>(at + 32);
  header.offset = bytes.read<std::uint32_t>(at + 42);
  at += kDirectorySize;
  if (static_cast<std::uint64_t>(name) + extra + comment > directory.end - at)
    bytes.fail(fmt::format("a directory entry at byte {} passes the directory", at - kDirectorySize));
  entry.name = bytes.text(at, name);
  read_zip64(bytes, at + name, extra, header);
  at += static_cast<std::uint64_t>(name) + extra + comment;
  const auto fail = [&](const std::string& what) {
    bytes.fail(fmt::format("entry {}: {}", quoted_name(entry.name), what));
  };
  if ((header.flags & ~(kSizesFollow | kUtf8)) != 0)
    fail(fmt::format("flags {:#x}, expected one that is not encrypted", header.flags));
  if (header.method != 0 || header.stored != header.size)
    fail("compressed, expected one that is stored as torch.save does");
  return entry;
}

}  // namespace

ZipArchive ZipArchive::open(const std::string& path) {
  const OpenFile file(path);
  ZipArchive archive;
  archive.path_ = path;
  archive.map_ = file.map();
  const Bytes bytes(path, archive.map_.get(), file.size());
  const Directory directory = find_directory(bytes);
  std::vector<Named> listed;
  std::uint64_t at = directory.begin;
  for (std::uint64_t i = 0; i < directory.entries; ++i) {
    listed.push_back(read_listed(bytes, directory, at));
    check_local(bytes, directory.begin, listed.back());
  }
  if (at != directory.end) bytes.fail(fmt::format("the directory goes on behind its last entry, at byte {}", at));
  std::sort(listed.begin(), listed.end(),
            [](const Named& a, const Named& b) { return a.header.offset < b.header.offset; });
  std::uint64_t free = 0;
  for (Named& entry : listed) {
    const std::string name = quoted_name(entry.name);
    if (entry.header.offset < free) bytes.fail(fmt::format("entry {}: overlaps another", name));
    free = entry.end;
    if (!archive.entries_.emplace(std::move(entry.name), entry.entry).second)
      bytes.fail(fmt::format("entry {}: is there twice", name));
  }
  return archive;
}

const ZipEntry* ZipArchive::find(const std::string& name) const {
  const auto found = entries_.find(name);
  return found == entries_.end() ? nullptr : &found->second;
}

void ZipArchive::verify(const std::string& name) const {
  if (verified_.contains(name)) return;
  const ZipEntry& entry = entries_.at(name);
  const std::span<const std::byte> data = bytes(entry);
  const auto found = static_cast<std::uint32_t>(
      ::crc32_z(::crc32_z(0, nullptr, 0), reinterpret_cast<const Bytef*>(data.data()), data.size()));
  if (found != entry.crc32)
    throw Error(ErrorKind::input, fmt::format("{}: entry {}: expected the checksum {:08x}, found {:08x}: the file is "
                                              "damaged, get it again",
                                              path_, quoted_name(name), entry.crc32, found));
  verified_.insert(name);
}

}  // namespace sparvar
