#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <vector>

#include "sparvar/pipeline.h"

namespace sparvar {
namespace {

namespace fs = std::filesystem;

constexpr const char* kName = "emoji";

/// Under the prefix that this code was installed in, which may have been moved: the code is the program in bin/, or a
/// shared library in lib/ or lib/TRIPLET/.
std::vector<fs::path> beside_the_code() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&bundled_model_dir), &info) == 0 || info.dli_fname == nullptr) return {};
  std::error_code error;
  const fs::path file = fs::canonical(info.dli_fname, error);  // a program's is as it was called: perhaps no path
  if (error) return {};
  const fs::path folder = file.parent_path();
  return {folder.parent_path(), folder.parent_path().parent_path()};
}

}  // namespace

std::string bundled_model_dir() {
  if (const char* chosen = std::getenv("SPARVAR_MODEL"); chosen != nullptr && *chosen != '\0') return chosen;
  std::error_code error;
  std::vector<fs::path> prefixes = beside_the_code();
  prefixes.push_back(fs::read_symlink("/proc/self/exe", error).parent_path().parent_path());
  std::vector<fs::path> candidates;
  candidates.reserve(prefixes.size() + 2);
  for (const fs::path& prefix : prefixes) candidates.push_back(prefix / "share" / "sparvar" / "models" / kName);
  candidates.push_back(fs::path(SPARVAR_SOURCE_DIR) / "models" / kName);
  candidates.push_back(fs::path(SPARVAR_INSTALL_PREFIX) / "share" / "sparvar" / "models" / kName);
  for (const fs::path& candidate : candidates)
    if (fs::exists(candidate / "config.json", error)) return candidate.string();
  throw Error(
      ErrorKind::input,
      "the bundled model emoji is not where it was installed; name a model folder (--model DIR or SPARVAR_MODEL)");
}

}  // namespace sparvar
