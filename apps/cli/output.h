// Where pictures go: one file, or an existing folder with a name made of the prompt.
#pragma once

#include <string>
#include <vector>

namespace sparvar::cli {

class Output {
 public:
  /// Checks that pictures can be written, before minutes are spent on drawing them: the folder exists and may be
  /// written, and no file in `inputs` would be overwritten. Throws Error(usage) for several pictures into one file.
  Output(std::string target, int prompts, int pictures_per_prompt, const std::vector<std::string>& inputs);

  /// <prompt index>-<words of the prompt>-<picture>.png in the folder, or the one file.
  std::string path(const std::string& prompt, int prompt_index, int picture_index) const;

 private:
  std::string target_;
  bool is_file_;
};

}  // namespace sparvar::cli
