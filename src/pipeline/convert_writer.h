// Tensors of checkpoints into .safetensors files, converted piece by piece.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "pipeline/convert_layout.h"
#include "sparvar/convert.h"

namespace sparvar {

/// A tensor as it will lie in a file.
struct PlannedTensor {
  enum class Form : std::uint8_t { plain, int8, int8_scale, fp8, fp8_scale } form = Form::plain;
  std::string name;    // in the file
  std::string source;  // ConvertSource's name
  DType dtype = DType::f32;
  Shape shape;
  std::int64_t bytes() const;
};

/// One file of a model folder.
struct PlannedFile {
  std::string name;
  const ConvertSource* source = nullptr;
  std::vector<PlannedTensor> tensors;  // in the order of the file: wide types first, so that all are aligned
  std::string header() const;          // with its length in front, padded to 8 bytes
  std::int64_t bytes() const;
};

/// Files STEM.safetensors, or STEM-0000i-of-0000n.safetensors with an index, of tensors in the layout's order. Throws
/// Error(input) where a tensor is no floating-point number.
std::vector<PlannedFile> plan_files(const std::string& stem, const ConvertSource& source,
                                    const std::vector<WantedTensor>& layout, ConvertType type,
                                    std::int64_t shard_bytes);

/// Called with the bytes of every piece.
using PieceCounter = std::function<void(std::int64_t bytes)>;

/// Writes the file whole or not at all; returns the checksum of its bytes. The checksum of what is read is compared
/// where the checkpoint has one.
std::uint32_t write_tensors(const PlannedFile& file, const std::string& path, const PieceCounter& count);

/// The checksum of a file as the disk has it.
std::uint32_t read_back(const std::string& path, const PieceCounter& count);

}  // namespace sparvar
