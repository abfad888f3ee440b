#include <cstdlib>
#include <filesystem>

#include "sparvar/pipeline.h"

namespace sparvar {

std::string bundled_model_dir() {
  namespace fs = std::filesystem;
  constexpr const char* kName = "emoji-v0";
  if (const char* chosen = std::getenv("SPARVAR_MODEL"); chosen != nullptr && *chosen != '\0') return chosen;
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  const fs::path candidates[] = {program.parent_path().parent_path() / "share" / "sparvar" / "models" / kName,
                                 fs::path(SPARVAR_SOURCE_DIR) / "models" / kName,
                                 fs::path(SPARVAR_INSTALL_PREFIX) / "share" / "sparvar" / "models" / kName};
  for (const fs::path& candidate : candidates)
    if (fs::exists(candidate / "config.json", error)) return candidate.string();
  throw Error(
      ErrorKind::input,
      "the bundled model emoji-v0 is not where it was installed; name a model folder (--model DIR or SPARVAR_MODEL)");
}

}  // namespace sparvar
