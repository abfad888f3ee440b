#include "weights/fingerprint.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "core/open_file.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kEnd = 64 << 10;
constexpr std::uint64_t kBlock = 4 << 10;
constexpr std::uint64_t kBlocks = 64;
constexpr std::uint64_t kWhole = 512 << 10;

class Fnv {
 public:
  void add(std::span<const std::byte> bytes) {
    for (const std::byte byte : bytes) {
      state_ ^= static_cast<std::uint64_t>(byte);
      state_ *= 0x100000001b3U;
    }
  }
  std::uint64_t value() const { return state_; }

 private:
  std::uint64_t state_ = 0xcbf29ce484222325U;
};

bool counts(const fs::path& path) {
  const std::string name = path.filename().string();
  return name == "config.json" || name == "spiece.model" || name.ends_with(".safetensors") ||
         name.ends_with(".safetensors.index.json");
}

void add_file(Fnv& hash, const std::string& path) {
  const OpenFile file(path);
  const std::string label = fmt::format("{}\n{}\n", fs::path(path).filename().string(), file.size());
  hash.add(std::as_bytes(std::span(label)));
  const std::shared_ptr<const std::byte> data = file.map();
  const std::span<const std::byte> all(data.get(), data ? file.size() : 0);
  if (all.size() <= kWhole) return hash.add(all);
  hash.add(all.first(kEnd));
  const std::uint64_t room = all.size() - 2 * kEnd - kBlock;
  for (std::uint64_t i = 0; i < kBlocks; ++i) hash.add(all.subspan(kEnd + room * i / (kBlocks - 1), kBlock));
  hash.add(all.last(kEnd));
}

}  // namespace

std::string fingerprint(const std::string& folder) {
  std::vector<std::string> paths;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error))
    if (counts(entry.path())) paths.push_back(entry.path().string());
  if (error) throw Error(ErrorKind::system, fmt::format("{}: cannot be listed: {}", folder, error.message()));
  std::sort(paths.begin(), paths.end());
  Fnv hash;
  for (const std::string& path : paths) add_file(hash, path);
  return fmt::format("{:016x}", hash.value());
}

}  // namespace sparvar
