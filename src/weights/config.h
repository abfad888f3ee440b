// config.json of a model folder as data. Every field is checked when read.
#pragma once

#include <string>
#include <vector>

#include "sparvar/schedule.h"

namespace sparvar {

/// Options of upstream's Infinity (infinity/models/infinity.py); names are upstream's.
struct InfinityConfig {
  int depth = 0;
  int embed_dim = 0;
  int num_heads = 0;
  int block_chunks = 1;  // 1: tensors are called blocks.i, else block_chunks.c.module.i
  double mlp_ratio = 4.0;
  int text_channels = 0;
  int text_maxlen = 512;
  int codebook_dim = 0;  // bits of the VAE; patchify: a word has 4 times as many
  bool apply_spatial_patchify = false;
  int rope2d_normalized_by_hw = 2;  // 0, 1, 2
  bool rope2d_each_sa_layer = true;
  bool add_lvl_embeding_only_first_block = true;
  bool cos_attn = true;
  bool shared_aln = true;
  bool nm0 = false;  // LayerNorm before word_embed
  double norm_eps = 1e-6;
  double rope_base = 10000.0;
  std::vector<int> cfg_insertion_layer = {
      0};  // 0: guidance on logits; -n: on the output of the n-th layer from the end

  int head_dim() const { return embed_dim / num_heads; }
  int bits() const { return codebook_dim * (apply_spatial_patchify ? 4 : 1); }
  int ffn_dim() const;  // round(mlp_ratio * C / 256) * 256
};

/// BSQ-VAE (infinity/models/bsq_vae).
struct VaeConfig {
  int codebook_dim = 0;
  int patch_size = 16;
  int ch = 128;
  std::vector<int> ch_mult;
  int num_res_blocks = 2;
  int norm_num_groups = 32;
  double norm_eps = 1e-6;
};

/// T5 v1.1 encoder (Hugging Face T5Config names).
struct T5Config {
  int vocab_size = 0;
  int d_model = 0;
  int d_kv = 64;
  int d_ff = 0;
  int num_layers = 0;
  int num_heads = 0;
  int relative_attention_num_buckets = 32;
  int relative_attention_max_distance = 128;
  double layer_norm_epsilon = 1e-6;
};

struct ModelConfig {
  std::string architecture;
  InfinityConfig transformer;
  VaeConfig vae;
  T5Config text_encoder;
  ScaleSchedule schedule;  // token grids
  Grid rope_grid;          // last grid of the 1M schedule of this aspect ratio: what RoPE positions map to
  std::vector<float> default_cfg;
  std::vector<float> default_tau;
};

/// Throws Error(input): file, key, expected and found. Unknown keys are errors that name the nearest known key.
ModelConfig read_model_config(const std::string& path);
ModelConfig parse_model_config(const std::string& text, const std::string& where);

}  // namespace sparvar
