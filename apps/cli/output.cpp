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

/// The format that the target's name asks for; none where it is no picture's name.
std::optional<ImageFormat> format_in(const std::string& target) {
  try {
    return format_of(target);
  } catch (const Error&) {
    return std::nullopt;
  }
}

const char* extension(ImageFormat format) {
  constexpr const char* extensions[] = {"png", "jpg", "webp"};
  return extensions[static_cast<int>(format)];
}

std::string stem(const std::string& prompt, int prompt_index, int picture_index) {
  return fmt::format("{:04}-{}-{:04}", prompt_index, slug(prompt), picture_index);
}

}  // namespace

void require_writable_folder(const std::string& folder, const std::string& flag) {
  std::error_code status;
  if (!fs::exists(folder, status))
    throw Error(ErrorKind::system, fmt::format("{}: this output folder does not exist; make it first", folder));
  if (!fs::is_directory(folder, status))
    throw Error(ErrorKind::system, fmt::format("{}: is not a folder; {} takes {}an existing folder", folder, flag,
                                               flag == "-o" ? "FILE.png, .jpg or .webp, or " : ""));
  if (access(folder.c_str(), W_OK | X_OK) != 0)
    throw Error(ErrorKind::system, fmt::format("{}: cannot be written: {}", folder, std::strerror(errno)));
}

Output::Output(std::string target, std::optional<ImageFormat> format, int prompts, int pictures_per_prompt,
               const std::vector<std::string>& inputs)
    : target_(std::move(target)) {
  const std::optional<ImageFormat> named = format_in(target_);
  format_ = format.value_or(named.value_or(ImageFormat::png));
  is_file_ = named.has_value();
  if (!is_file_) {
    require_writable_folder(target_, "-o");
    return;
  }
  if (*named != format_)
    throw Error(ErrorKind::usage, fmt::format("{}: its name says {} and --format {}; leave one of them out", target_,
                                              name_of(*named), name_of(format_)));
  if (prompts * pictures_per_prompt > 1) {
    throw Error(ErrorKind::usage,
                fmt::format("{}: {} pictures do not fit into one file; give an existing folder with -o", target_,
                            prompts * pictures_per_prompt));
  }
  std::error_code status;
  if (fs::is_directory(target_, status)) {
    throw Error(ErrorKind::system,
                fmt::format("{}: is a folder; -o FILE.{} needs a file's name", target_, extension(format_)));
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
  require_writable_folder(folder.empty() ? "." : folder.string(), "-o");
}

std::string Output::path(const std::string& prompt, int prompt_index, int picture_index) const {
  if (is_file_) return target_;
  const std::string name = fmt::format("{}.{}", stem(prompt, prompt_index, picture_index), extension(format_));
  return (fs::path(target_) / name).lexically_normal().string();
}

std::string Output::preview_path(const std::string& folder, const std::string& prompt, int prompt_index,
                                 int picture_index, int scale) const {
  const std::string name =
      fmt::format("{}-scale-{:02}.{}", stem(prompt, prompt_index, picture_index), scale, extension(format_));
  return (fs::path(folder) / name).lexically_normal().string();
}

}  // namespace sparvar::cli
