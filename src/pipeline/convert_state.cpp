#include "pipeline/convert_state.h"

#include <fmt/format.h>

#include <filesystem>
#include <utility>

#include "core/open_file.h"
#include "image/atomic_file.h"
#include "sparvar/error.h"
#include "weights/strict_json.h"

namespace sparvar {
namespace {

namespace fs = std::filesystem;

constexpr const char* kName = "convert.json";
constexpr std::uint64_t kMaxBytes = 4'000'000;
constexpr int kMaxDepth = 16;

/// Does the folder hold what a conversion would write over?
std::string taken_by(const std::string& folder) {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    if (name == kName || name == "config.json" || name == "spiece.model" || name.ends_with(".safetensors") ||
        name.ends_with(".index.json"))
      return name;
  }
  return {};
}

}  // namespace

ConvertState::ConvertState(std::string folder, nlohmann::ordered_json settings, bool resume)
    : folder_(std::move(folder)) {
  json_["settings"] = std::move(settings);
  json_["complete"] = false;
  json_["files"] = nlohmann::ordered_json::object();
  std::error_code error;
  fs::create_directories(folder_, error);
  if (error)
    throw Error(ErrorKind::system, fmt::format("{}: this folder cannot be made: {}", folder_, error.message()));
  remove_left_pieces(folder_);
  const std::string path = (fs::path(folder_) / kName).string();
  const std::string taken = taken_by(folder_);
  if (!taken.empty() && !resume)
    throw Error(ErrorKind::usage,
                fmt::format("{}: holds {} already; name another folder, or go on with a conversion that "
                            "was stopped (--resume)",
                            folder_, taken));
  if (!fs::exists(path, error)) {
    if (!taken.empty())
      throw Error(ErrorKind::usage,
                  fmt::format("{}: holds {}, but no {}: it is no conversion that can go on", folder_, taken, kName));
    write();
    return;
  }
  const nlohmann::json found = parse_json(read_text(path, kMaxBytes), path, kMaxDepth);
  if (!found.is_object() || found.value("settings", nlohmann::json()) != nlohmann::json(json_["settings"]))
    throw Error(ErrorKind::usage, fmt::format("{}: was begun with other checkpoints, another --dtype or another --set; "
                                              "name another folder",
                                              path));
  const auto files = found.find("files");
  if (files == found.end() || !files->is_object()) return;
  for (const auto& [name, file] : files->items())
    if (file.is_object() && file.contains("bytes") && file["bytes"].is_number_integer() && file.contains("crc32") &&
        file["crc32"].is_number_unsigned())
      json_["files"][name] = {{"bytes", file["bytes"]}, {"crc32", file["crc32"]}};
}

const nlohmann::ordered_json* ConvertState::finished(const std::string& name, std::int64_t bytes) const {
  const auto found = json_["files"].find(name);
  std::error_code ignored;
  const fs::path path = fs::path(folder_) / name;
  if (found == json_["files"].end() || (*found)["bytes"] != bytes || !fs::is_regular_file(path, ignored) ||
      fs::file_size(path, ignored) != static_cast<std::uintmax_t>(bytes))
    return nullptr;
  return &*found;
}

void ConvertState::finish(const std::string& name, std::int64_t bytes, std::uint32_t crc32) {
  json_["files"][name] = {{"bytes", bytes}, {"crc32", crc32}};
  write();
}

void ConvertState::forget(const std::string& name) { json_["files"].erase(name); }

void ConvertState::complete() {
  json_["complete"] = true;
  write();
}

void ConvertState::write() const {
  const std::string text = json_.dump(1) + "\n";
  write_file_atomically((fs::path(folder_) / kName).string(),
                        {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
}

}  // namespace sparvar
