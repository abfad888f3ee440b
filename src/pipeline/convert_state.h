// convert.json of a model folder: from what it was made, and which files are finished.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

namespace sparvar {

class ConvertState {
 public:
  /// `settings`: all that decides the bytes of the files. Where the folder holds a conversion already: Error(usage)
  /// unless `resume`, and if its settings are others. Makes the folder where it is not there.
  ConvertState(std::string folder, nlohmann::ordered_json settings, bool resume);

  /// The checksum of a finished file of this size, or nothing.
  const nlohmann::ordered_json* finished(const std::string& name, std::int64_t bytes) const;
  /// Written at once: a conversion that is stopped goes on behind this file.
  void finish(const std::string& name, std::int64_t bytes, std::uint32_t crc32);
  void forget(const std::string& name);
  void complete();

 private:
  void write() const;
  std::string folder_;
  nlohmann::ordered_json json_;
};

}  // namespace sparvar
