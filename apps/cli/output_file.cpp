#include "output_file.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "sparvar/error.h"

namespace sparvar::cli {

void check_output_file(const std::string& flag, const std::string& path, const std::string& extension,
                       const std::vector<std::string>& inputs) {
  namespace fs = std::filesystem;
  if (path.empty()) return;
  if (fs::path(path).extension() != extension)
    throw Error(ErrorKind::usage, fmt::format("{}: {} writes a file whose name ends in {}", path, flag, extension));
  std::error_code status;
  if (fs::is_directory(path, status))
    throw Error(ErrorKind::system, fmt::format("{}: is a folder; {} needs a file's name", path, flag));
  for (const std::string& input : inputs)
    if (fs::equivalent(path, input, status))
      throw Error(ErrorKind::usage, fmt::format("{}: is an input of this run; choose another name for {}", path, flag));
  const fs::path parent = fs::path(path).parent_path();
  const fs::path folder = parent.empty() ? fs::path(".") : parent;
  if (!fs::is_directory(folder, status))
    throw Error(ErrorKind::system,
                fmt::format("{}: this output folder does not exist; make it first", folder.string()));
  if (access(folder.c_str(), W_OK | X_OK) != 0)
    throw Error(ErrorKind::system, fmt::format("{}: cannot be written: {}", folder.string(), std::strerror(errno)));
}

}  // namespace sparvar::cli
