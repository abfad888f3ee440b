#include "pipeline/convert_source.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>
#include <utility>

#include "sparvar/error.h"
#include "weights/strict_json.h"

namespace sparvar {
namespace {

/// FSDP and torch.compile put these into names, DataParallel one before all of them.
constexpr std::string_view kWrappers[] = {"_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."};
constexpr std::string_view kParallel = "module.";

std::string unwrapped(std::string name, bool parallel) {
  if (parallel) name.erase(0, kParallel.size());
  for (const std::string_view wrapper : kWrappers)
    for (std::size_t at = name.find(wrapper); at != std::string::npos; at = name.find(wrapper))
      name.erase(at, wrapper.size());
  return name;
}

}  // namespace

ConvertSource::ConvertSource(std::string part, const std::string& path, const std::vector<std::string>& places)
    : part_(std::move(part)), checkpoint_(Checkpoint::open(path, places)) {
  const std::vector<std::string> names = checkpoint_.names();
  const bool parallel = !names.empty() && std::all_of(names.begin(), names.end(), [](const std::string& name) {
    return name.starts_with(kParallel);
  });
  // Blocks in one chunk are called blocks.i, as those without chunks are.
  constexpr std::string_view kChunk = "block_chunks.0.module.";
  const bool one_chunk = std::none_of(names.begin(), names.end(), [](const std::string& name) {
    return name.find("block_chunks.1.") != std::string::npos;
  });
  for (const std::string& name : names) {
    std::string known = unwrapped(name, parallel);
    if (one_chunk && known.starts_with(kChunk)) known.replace(0, kChunk.size(), "blocks.");
    if (!names_.emplace(known, name).second) fail(name, "another tensor has this name without wrappers");
  }
}

void ConvertSource::fail(const std::string& name, const std::string& what) const {
  throw Error(ErrorKind::input, fmt::format("{}: tensor {}: {}", checkpoint_.path(), quoted_name(name), what));
}

const std::string& ConvertSource::original(const std::string& name) const {
  const auto found = names_.find(name);
  if (found == names_.end())
    fail(name,
         fmt::format("missing; expected the {} of an Infinity model, found {} other tensors", part_, names_.size()));
  return found->second;
}

Shape ConvertSource::shape(const std::string& name) const { return checkpoint_.shape(original(name)); }

Shape ConvertSource::shape(const std::string& name, int rank) const {
  Shape found = shape(name);
  if (static_cast<int>(found.size()) != rank)
    fail(name, fmt::format("expected {} dimensions, found the shape {}", rank, to_string(found)));
  return found;
}

std::vector<std::string> ConvertSource::names() const {
  std::vector<std::string> names;
  names.reserve(names_.size());
  for (const auto& [name, original] : names_) names.push_back(name);
  return names;
}

}  // namespace sparvar
