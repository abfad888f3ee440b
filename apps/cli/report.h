// What a run did, for people and for programs.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "sparvar/pipeline.h"

namespace sparvar::cli {

/// A finished run: what was asked, what came of it, where the files are.
struct Run {
  const ModelInfo& model;
  const GenerateOptions& options;
  const GenerateResult& result;
  const MemoryPlan& memory;        // peak 0 on a GPU
  std::vector<std::string> paths;  // of result.pictures, in order
  Precision precision = Precision::bf16;
  WeightFormat weights = WeightFormat::plain;
  double load_seconds = 0;
};

std::string text_report(const Run& run);
std::string json_report(const Run& run);

/// "memory 345 MB planned: program 40, weights 60, ...".
std::string memory_line(const MemoryPlan& plan);

/// The settings that make a picture again, kept in its file; `sparvar info` reads them.
ImageMetadata picture_metadata(const Run& run, const Picture& picture);

const char* name_of(Precision precision);
/// What the weights of the blocks are: fp8, or the numbers of the activations.
const char* name_of(WeightFormat weights, Precision precision);
nlohmann::ordered_json to_json(const ModelInfo& model);
/// This machine, what runs on it, and the largest memory so far.
nlohmann::ordered_json machine_json(const ModelInfo& model);
/// One object, indented; bytes that are not UTF-8 (a file's name may hold them) are replaced.
std::string dump(const nlohmann::ordered_json& json);

}  // namespace sparvar::cli
