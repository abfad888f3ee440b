// The attention kernels of one instruction set, and the choice between them at run time.
// This header is included by files compiled for newer machines, so it must stay free of inline code.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparvar {

struct KeyRun;

constexpr int kMaxTileQueries = 64;
constexpr int kColumnKeys = 64;
constexpr int kMaxHeadDim = 256;

/// One tile of at most 64 queries of one head against its keys. Strides count elements between rows.
struct AttendTask {
  const void* q;
  std::int64_t q_stride;
  const std::int32_t* rows;
  int row_count;
  const void* k;
  std::int64_t k_stride;
  const void* v;
  std::int64_t v_stride;
  const KeyRun* runs;
  std::int64_t run_count;
  int head_dim;
  float scale;
  void* out;  // row r of the scale is at out + r * out_stride
  std::int64_t out_stride;
  float* statistics;  // [row][2]: largest logit, sum of exp(logit - largest); null: not wanted
};

/// Column sums of at most 64 consecutive keys of one head, for all groups of queries.
struct ColumnTask {
  const void* q;
  std::int64_t q_stride;
  const float* statistics;
  const void* k;  // first of the keys
  std::int64_t k_stride;
  int key_count;
  const std::int32_t* group_offset;
  const std::int32_t* group_rows;
  int group_count;
  int head_dim;
  float scale;
  float* out;  // group g, key i: out[g * out_stride + i]
  std::int64_t out_stride;
};

struct AttentionKernels {
  const char* name;
  void (*attend_f32)(const AttendTask&, std::byte* scratch);
  void (*attend_bf16)(const AttendTask&, std::byte* scratch);
  void (*columns_f32)(const ColumnTask&, std::byte* scratch);
  void (*columns_bf16)(const ColumnTask&, std::byte* scratch);
};

/// What a kernel needs of 64-byte aligned scratch memory.
constexpr std::size_t kAttentionScratchBytes = 448 * 1024;

const AttentionKernels* generic_attention_kernels();
const AttentionKernels* avx2_attention_kernels();         // null where not compiled in
const AttentionKernels* avx512_attention_kernels();       // null where not compiled in
const AttentionKernels* avx512_bf16_attention_kernels();  // null where not compiled in

/// The fastest set this machine runs, or the one chosen by select_attention_kernels.
const AttentionKernels& attention_kernels();
/// Why attention_kernels() are these: what the processor has or lacks.
const char* attention_kernels_reason();
/// Chooses by name ("generic", "avx2", "avx512", "avx512-bf16"; empty: the fastest). False where this machine cannot.
bool select_attention_kernels(const char* name);

}  // namespace sparvar
