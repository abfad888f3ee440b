#include "weights/checkpoint.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>

#include "core/open_file.h"
#include "sparvar/error.h"
#include "weights/shards.h"
#include "weights/strict_json.h"

namespace sparvar {
namespace {

namespace fs = std::filesystem;

/// What Hugging Face and upstream call the checkpoint of a folder, the preferred first.
constexpr const char* kNames[] = {"model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json",
                                  "pytorch_model.bin"};

bool ends_as_tensors(const fs::path& path) {
  return path.extension() == ".safetensors" || path.extension() == ".pth" || path.extension() == ".pt";
}

/// The one checkpoint of a folder.
std::string in_folder(const std::string& folder) {
  std::error_code ignored;
  for (const char* name : kNames)
    if (fs::exists(fs::path(folder) / name, ignored)) return (fs::path(folder) / name).string();
  std::vector<std::string> found;
  for (const auto& entry : fs::directory_iterator(folder, ignored))
    if (ends_as_tensors(entry.path()) || entry.path().native().ends_with(".index.json"))
      found.push_back(entry.path().filename().string());
  std::sort(found.begin(), found.end());
  if (found.size() == 1) return (fs::path(folder) / found.front()).string();
  if (found.empty())
    throw Error(ErrorKind::input,
                fmt::format("{}: no checkpoint in this folder, expected one of {}, or one .safetensors "
                            "or .pth file",
                            folder, fmt::join(kNames, ", ")));
  found.resize(std::min<std::size_t>(found.size(), 4));
  throw Error(ErrorKind::input,
              fmt::format("{}: several checkpoints in this folder, name one: {} ...", folder, fmt::join(found, ", ")));
}

}  // namespace

void Checkpoint::add_file(const std::string& path, const std::vector<std::string>& places) {
  Part part;
  if (path.ends_with(".safetensors")) {
    part.plain = std::make_shared<const TensorFile>(TensorFile::open(path));
    for (const std::string& name : part.plain->names()) tensors_.emplace(name, part);
  } else {
    part.torch = std::make_shared<const TorchFile>(TorchFile::open(path, places));
    for (const std::string& name : part.torch->names()) tensors_.emplace(name, part);
  }
}

void Checkpoint::add_shards(const std::string& path, const std::vector<std::string>& places) {
  std::map<std::string, Checkpoint> shards;
  for (const auto& [name, shard] : read_shard_index(path)) {
    auto found = shards.find(shard);
    if (found == shards.end()) {
      found = shards.emplace(shard, Checkpoint()).first;
      found->second.add_file(shard, places);
    }
    if (!found->second.has(name))
      throw Error(ErrorKind::input, fmt::format("{}: tensor {}: missing from this shard, where {} says it is", shard,
                                                quoted_name(name), path));
    tensors_.emplace(name, found->second.part(name));
  }
}

Checkpoint Checkpoint::open(const std::string& path, const std::vector<std::string>& places) {
  std::error_code ignored;
  Checkpoint checkpoint;
  checkpoint.path_ = fs::is_directory(path, ignored) ? in_folder(path) : path;
  if (checkpoint.path_.ends_with(".json"))
    checkpoint.add_shards(checkpoint.path_, places);
  else
    checkpoint.add_file(checkpoint.path_, places);
  return checkpoint;
}

const Checkpoint::Part& Checkpoint::part(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end())
    throw Error(ErrorKind::input, fmt::format("{}: tensor {}: missing; the checkpoint has {} other tensors", path_,
                                              quoted_name(name), tensors_.size()));
  return found->second;
}

Tensor Checkpoint::get(const std::string& name, const Shape& shape) const {
  return part(name).weights().get(name, shape);
}
Tensor Checkpoint::f32(const std::string& name, const Shape& shape) const {
  return part(name).weights().f32(name, shape);
}

std::int64_t Checkpoint::parameters() const {
  std::int64_t count = 0;
  for (const auto& [name, part] : tensors_) {
    std::int64_t elements = 1;
    for (const std::int64_t extent : shape(name)) elements *= extent;
    count += elements;
  }
  return count;
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  names.reserve(tensors_.size());
  for (const auto& [name, part] : tensors_) names.push_back(name);
  return names;
}

DType Checkpoint::dtype(const std::string& name) const {
  const Part& from = part(name);
  return from.torch ? from.torch->dtype(name) : from.plain->get(name).dtype();
}

Shape Checkpoint::shape(const std::string& name) const {
  const Part& from = part(name);
  return from.torch ? from.torch->shape(name) : from.plain->get(name).shape();
}

void Checkpoint::verify(const std::string& name) const {
  if (const Part& from = part(name); from.torch) from.torch->verify(name);
}

std::string Checkpoint::place() const {
  return tensors_.empty() || !tensors_.begin()->second.torch ? std::string() : tensors_.begin()->second.torch->place();
}

}  // namespace sparvar
