#include "output.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cctype>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "sparvar/error.h"

namespace sparvar::cli {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t longest_slug = 48;

/// ASCII letters and digits in lower case, everything else one dash.
std::string slug(const std::string& prompt) {
  std::string out;
  for (const char c : prompt) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x80 && std::isalnum(byte) != 0) {
      out += static_cast<char>(std::tolower(byte));
    } else if (!out.empty() && out.back() != '-') {
      out += '-';
    }
    if (out.size() >= longest_slug) break;
  }
  while (out.ends_with('-')) out.pop_back();
  return out.empty() ? "picture" : out;
}

void require_writable_folder(const fs::path& folder) {
  std::error_code status;
  if (!fs::exists(folder, status)) {
    throw Error(ErrorKind::system,
                fmt::format("{}: this output folder does not exist; make it first", folder.string()));
  }
  if (!fs::is_directory(folder, status)) {
    throw Error(ErrorKind::system,
                fmt::format("{}: is not a folder; -o takes FILE.png or an existing folder", folder.string()));
  }
  if (access(folder.c_str(), W_OK | X_OK) != 0) {
    throw Error(ErrorKind::system, fmt::format("{}: cannot be written: {}", folder.string(), std::strerror(errno)));
  }
}

bool names_png(const std::string& target) {
  std::string extension = fs::path(target).extension().string();
  for (char& c : extension) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return extension == ".png";
}

}  // namespace

Output::Output(std::string target, int prompts, int pictures_per_prompt, const std::vector<std::string>& inputs)
    : target_(std::move(target)), is_file_(names_png(target_)) {
  if (!is_file_) {
    require_writable_folder(target_);
    return;
  }
  if (prompts * pictures_per_prompt > 1) {
    throw Error(ErrorKind::usage,
                fmt::format("{}: {} pictures do not fit into one file; give an existing folder with -o", target_,
                            prompts * pictures_per_prompt));
  }
  std::error_code status;
  if (fs::is_directory(target_, status)) {
    throw Error(ErrorKind::system, fmt::format("{}: is a folder; -o FILE.png needs a file's name", target_));
  }
  if (fs::exists(target_, status) && !fs::is_regular_file(target_, status)) {
    throw Error(ErrorKind::system, fmt::format("{}: exists and is not a regular file", target_));
  }
  for (const std::string& input : inputs) {
    if (fs::equivalent(target_, input, status)) {
      throw Error(ErrorKind::usage,
                  fmt::format("{}: is an input of this run; choose another name for the picture", target_));
    }
  }
  const fs::path folder = fs::path(target_).parent_path();
  require_writable_folder(folder.empty() ? fs::path(".") : folder);
}

std::string Output::path(const std::string& prompt, int prompt_index, int picture_index) const {
  if (is_file_) return target_;
  const std::string name = fmt::format("{:04}-{}-{:04}.png", prompt_index, slug(prompt), picture_index);
  return (fs::path(target_) / name).lexically_normal().string();
}

}  // namespace sparvar::cli
