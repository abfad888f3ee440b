// Upstream's checkpoints in, a model folder out.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "sparvar/error.h"

namespace sparvar {

/// What matrices are kept as (docs/model-format.md). Vectors and small terms stay as exact as the checkpoint has them.
enum class ConvertType : std::uint8_t {
  bf16,
  f32,
  int8,  // of the transformer and the text encoder, with a scale for each output; the picture's autoencoder is bf16
  fp8    // e4m3, of the linear layers of the transformer's blocks, with a scale for each output: the bits that a GPU
         // makes of a bf16 folder with WeightFormat::fp8; all else is bf16
};

/// How far a conversion is: bytes that were written and, at the end, read back.
struct ConvertProgress {
  std::string file;  // at which it is
  bool verifying = false;
  std::int64_t bytes_done = 0, bytes_total = 0;
};

struct ConvertOptions {
  /// A file of torch.save or safetensors, an index of shards, or a folder that holds one of them.
  std::string transformer, vae;
  std::string text_encoder;  // a folder of Hugging Face's: config.json, spiece.model and a checkpoint
  std::string output;        // the model folder; made where it is not there
  ConvertType type = ConvertType::bf16;
  /// Values of config.json that shapes do not tell, or that are other than those of the released models:
  /// "transformer.num_heads=16", "scales=[1,2,4]". The value is JSON, or a text.
  std::vector<std::string> set;
  /// Where the state dict is in the file ("ema", "trainer.gpt_fsdp"); empty: it is looked for.
  std::string transformer_key, vae_key;
  /// Goes on with a conversion into `output` that was stopped, or verifies a finished one.
  bool resume = false;
  std::int64_t shard_bytes = 4'000'000'000;  // files larger than this are cut into shards
  std::function<void(const ConvertProgress&)> on_progress{};
  const std::atomic<bool>* cancel = nullptr;  // seen within a few megabytes
};

struct ConvertedFile {
  std::string name;  // in the model folder
  std::int64_t bytes = 0;
  std::uint32_t crc32 = 0;  // of the whole file
  int tensors = 0;          // 0: no file of tensors
  bool reused = false;      // written by the conversion that this one went on with
};

struct ConvertResult {
  std::string folder;
  std::string config;  // text of config.json
  std::vector<ConvertedFile> files;
  /// Tensors that the engine does not need (masks, buffers of training): "transformer: lvl_1L".
  std::vector<std::string> skipped;
  /// Where state dicts inside of other dicts were: "vae: at 'vae' of infinity_vae.pth".
  std::vector<std::string> places;
  double seconds = 0;
};

/// Reads the checkpoints without running any code of theirs, and writes a model folder: tensor by tensor, so that
/// memory stays small; every file whole or not at all; config.json last, after all files were read back and their
/// checksums compared. Throws Error: input (file, tensor, expected and found), usage, system (disk), cancelled.
ConvertResult convert_checkpoint(const ConvertOptions& options);

}  // namespace sparvar
