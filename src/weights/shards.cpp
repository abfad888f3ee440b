#include "weights/shards.h"

#include <fmt/format.h>

#include <filesystem>
#include <string_view>

#include "core/open_file.h"
#include "sparvar/error.h"
#include "weights/strict_json.h"

namespace sparvar {
namespace {

constexpr std::uint64_t kMaxIndex = 100'000'000;
constexpr int kMaxDepth = 8;

Error bad_tensor(const std::string& path, const std::string& name, const std::string& what) {
  return {ErrorKind::input, fmt::format("{}: tensor {}: {}", path, quoted_name(name), what)};
}

/// A shard is a file next to its index: names that lead elsewhere are refused.
void check_shard_name(const std::string& path, const std::string& tensor, const nlohmann::json& value) {
  if (!value.is_string()) throw bad_tensor(path, tensor, "expected the name of a shard, found " + describe(value));
  const auto& name = value.get_ref<const std::string&>();
  const bool plain = !name.empty() && name != "." && name != ".." &&
                     name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
  if (!plain)
    throw bad_tensor(path, tensor,
                     fmt::format("expected a shard in the folder of the index, found {}", quoted_name(name)));
}

}  // namespace

std::map<std::string, std::string> read_shard_index(const std::string& path) {
  const nlohmann::json json = parse_json(read_text(path, kMaxIndex), path, kMaxDepth);
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object())
    throw Error(ErrorKind::input, path + ": expected an index with an object 'weight_map' (tensor name -> shard)");
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  std::map<std::string, std::string> shards;
  for (const auto& [name, value] : json["weight_map"].items()) {
    check_shard_name(path, name, value);
    const auto& shard = value.get_ref<const std::string&>();
    const std::string shard_path = (folder / shard).string();
    std::error_code ignored;
    if (!std::filesystem::exists(shard_path, ignored))
      throw bad_tensor(path, name,
                       fmt::format("expected its shard {} next to the index, found no such file", quoted_name(shard)));
    shards.emplace(name, shard_path);
  }
  return shards;
}

}  // namespace sparvar
