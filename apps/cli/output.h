// Where pictures go: one file, or an existing folder with a name made of the prompt; and in which format.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "sparvar/image.h"

namespace sparvar::cli {

/// Throws where the folder does not exist or cannot be written. `flag` names the option in the message.
void require_writable_folder(const std::string& folder, const std::string& flag);

class Output {
 public:
  /// Checks that pictures can be written, before minutes are spent on drawing them: the folder exists and may be
  /// written, and no file in `inputs` would be overwritten. `format`: of --format, else the target's extension decides,
  /// else PNG. Throws Error(usage) for several pictures into one file and for a format that is not the extension's.
  Output(std::string target, std::optional<ImageFormat> format, int prompts, int pictures_per_prompt,
         const std::vector<std::string>& inputs);

  ImageFormat format() const { return format_; }
  /// <prompt index>-<words of the prompt>-<picture>.png in the folder, or the one file.
  std::string path(const std::string& prompt, int prompt_index, int picture_index) const;
  /// The same name in `folder`, with the scale: ...-scale-07.png.
  std::string preview_path(const std::string& folder, const std::string& prompt, int prompt_index, int picture_index,
                           int scale) const;

 private:
  std::string target_;
  bool is_file_;
  ImageFormat format_ = ImageFormat::png;
};

}  // namespace sparvar::cli
