// Launchers of the CUDA kernels: raw device pointers in, work enqueued on a stream. No launcher waits, allocates or
// touches host memory, so each may be captured into a graph. Every one checks cudaGetLastError() and throws
// Error(system).
// T is bf16 or f32 (`DType` arguments say which); sums are f32. Rows are the flattened leading axes; a modulation row
// (scale, shift, gate) serves `period` rows one after the other: row r uses modulation row r / period.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention/token_order.h"
#include "core/tensor.h"
#include "sparvar/schedule.h"

namespace sparvar::cuda {

// ---------------------------------------------------------------- norm.cu: one pass over rows of up to 16384 channels
struct RowNorm {
  std::int64_t rows = 0;
  int width = 0;
  std::int64_t period = 1;       // rows that share one row of scale and shift
  const float* scale = nullptr;  // [rows / period, width at scale_stride]; null: 1
  const float* shift = nullptr;  // null: 0
  float scale_offset = 0;        // 1: out = norm(x) * (1 + scale) + shift
  float eps = 1e-6F;
  bool centred = true;          // LayerNorm; false: RMSNorm
  float* out_scales = nullptr;  // [rows], of an out_type of e4m3: as quantise_rows
  bool settled = false;         // scale, shift and gate are there, whatever was launched before is still to do
};
/// out [rows, width] (out_type) = norm of x f32.
void normalise(const RowNorm& norm, const float* x, void* out, DType out_type, cudaStream_t stream);
/// residual += gate * y (gate [rows / gate_period, width] or null for 1), then, where `out` is not null, its norm.
void add_gated_normalise(const RowNorm& norm, float* residual, const void* y, DType y_type, const float* gate,
                         std::int64_t gate_period, void* out, DType out_type, cudaStream_t stream);

// ---------------------------------------------------------------- quantise.cu
/// out e4m3 [rows, width] and scales [rows]: x = out * scale, scale = largest |x| of the row / 448, at least 2^-120. A
/// NaN stays one, a row with an infinity becomes NaN.
struct QuantiseRows {
  static constexpr int kWidest = 32768;
  const void* x = nullptr;  // 16 bytes aligned
  DType type = DType::bf16;
  std::int64_t rows = 0;
  int width = 0;      // a multiple of 8, at most kWidest
  bool gelu = false;  // of gelu_tanh(x)
  void* out = nullptr;
  float* scales = nullptr;
};
void quantise_rows(const QuantiseRows& args, cudaStream_t stream);
/// What is left to do of a product of e4m3 numbers: y bf16 [rows, out] becomes act(y x_scales[row] w_scales[o] +
/// bias[o]).
struct ScaleProduct {
  void* y = nullptr;  // 16 bytes aligned
  std::int64_t rows = 0;
  int out = 0;                      // a multiple of 8
  const float* x_scales = nullptr;  // [rows]
  const float* w_scales = nullptr;  // [out], 16 bytes aligned
  const void* bias = nullptr;       // bf16 [out], 16 bytes aligned, or null
  bool gelu = false;                // tanh form
};
void scale_product(const ScaleProduct& args, cudaStream_t stream);

// ---------------------------------------------------------------- qkv.cu
struct SplitQkv {
  const void* qkv = nullptr;  // [B, n, 3, H, D]
  DType qkv_type = DType::bf16;
  int batch = 0, n = 0, heads = 0, dim = 0;  // dim even, 8 to 256
  bool l2_norm = true;                       // q, k / max(|.|, 1e-12)
  const float* head_scale = nullptr;         // [H], q times it, or null
  const float* rope = nullptr;               // [n, D/2, 2] (cos, sin) of pairs (2i, 2i + 1), or null
  void* q = nullptr;                         // [B, H, n, D] of out_type
  void* k = nullptr;                         // caches [B, H, capacity, D] of out_type, rows offset .. offset + n
  void* v = nullptr;
  DType out_type = DType::bf16;
  std::int64_t capacity = 0, offset = 0;
  bool settled = false;  // head_scale was there before the program: it is read before anything is waited for
};
void split_qkv(const SplitQkv& args, cudaStream_t stream);
/// Copies cache [B * H, from_rows, row_bytes] into the first rows of [B * H, to_rows, row_bytes].
void copy_into_larger(const void* from, std::int64_t from_rows, void* to, std::int64_t to_rows, std::int64_t heads,
                      std::int64_t row_bytes, cudaStream_t stream);

// ---------------------------------------------------------------- elementwise.cu
void fill_random(void* out, DType type, std::int64_t count, std::uint64_t seed, float deviation,
                 cudaStream_t stream);  // normal, Philox
void convert(const void* from, DType from_type, void* to, DType to_type, std::int64_t count, cudaStream_t stream);
/// In place: SiLU, or else the tanh form of GELU.
void activate(void* x, DType type, std::int64_t count, bool silu, cudaStream_t stream);
void gated_gelu(const void* a, const void* b, void* out, DType type, std::int64_t count,
                cudaStream_t stream);  // gelu_tanh(a) b
/// *count = how many 32-bit words of `bytes` bytes differ (a rest of fewer bytes counts as one).
void count_differing(const void* a, const void* b, std::int64_t bytes, unsigned* count, cudaStream_t stream);
/// x[i] += y[i % period]
void add_repeated(float* x, const float* y, std::int64_t count, std::int64_t period, cudaStream_t stream);
/// out [6 or parts, rows, width] = shared [rows, parts, width] + own [parts, width] (own may be null).
void modulation(const float* shared, const float* own, std::int64_t rows, int parts, int width, float* out,
                cudaStream_t stream);
/// Guidance on hidden states, in place: x f32 [2, half]; both halves become cfg * first + (1 - cfg) * second.
void guide_hidden(float* x, std::int64_t half, const float* cfg, cudaStream_t stream);
/// out = logits[0] * g[1], guided: g[0] * (first g[1]) + (1 - g[0]) * (second g[1]); g = (cfg, 1 / tau) on the device.
void guide_logits(const float* logits, std::int64_t half, bool guided, const float* guidance, float* out,
                  cudaStream_t stream);
/// out = a - b
void subtract(const void* a, DType a_type, const void* b, DType b_type, void* out, DType out_type, std::int64_t count,
              cudaStream_t stream);

// ---------------------------------------------------------------- few_rows.cu: products that only read their weights
// once
/// y = act(x W^T + b) for few rows of x (up to 64; up to 144 where that is faster than cuBLASLt), on Hopper: the
/// weights stream through shared memory, and begin to while the kernel before is still running.
struct FewRows {
  DType type = DType::bf16;         // of x and w; e4m3: x[r] stands for x[r] * x_scales[r], w[o] for w[o] * w_scales[o]
  const void* x = nullptr;          // [rows, in]
  const void* w = nullptr;          // [out, in]
  const float* x_scales = nullptr;  // [rows]
  const float* w_scales = nullptr;  // [out]
  const void* bias = nullptr;       // [out] of y's type, or null
  void* y = nullptr;                // [rows, out] of y_type
  DType y_type = DType::bf16;
  int rows = 0, in = 0, out = 0;
  bool gelu = false;  // tanh form
  /// w, w_scales and bias were there before the program: they are read before anything is waited for.
  bool settled = false;
};
/// Of the current device and these sizes; x, w and y are 16 bytes aligned.
bool supports_few_rows(DType type, std::int64_t rows, std::int64_t in, std::int64_t out);
void few_rows(const FewRows& args, cudaStream_t stream);

// ---------------------------------------------------------------- bits.cu (semantics: src/bits/sampling.h, codes.h)
/// sampling: device words [4] = {seed, first_picture, greedy (0 / 1), bits of the float `rarest` = 1 - top_p, or of
/// -1}.
void sample_bits(const float* logits, int pictures, int tokens, int bits, const std::uint64_t* sampling, int scale,
                 std::uint8_t* out, cudaStream_t stream);
/// summed f32 [B, d, H, W] += bilinear(codes of bits U8 [B, n, bits]); patchify: pixel_shuffle(2), grid twice as fine.
void add_codes(const std::uint8_t* bits, int pictures, Grid tokens, int bit_count, bool patchify, float* summed,
               Grid full, cudaStream_t stream);
/// words f32 [B, n, bits] of the token grid from summed f32 [B, d, H, W].
void words_of(const float* summed, int pictures, int channels, Grid full, Grid tokens, bool patchify, float* words,
              cudaStream_t stream);

// ---------------------------------------------------------------- attention.cu
struct DenseAttention {
  const void* q = nullptr;  // element (b, i, h, d) at b * q_batch + i * q_row + h * q_head + d; the others alike
  const void* k = nullptr;
  const void* v = nullptr;
  void* out = nullptr;
  DType type = DType::bf16;                        // of all four
  int batch = 0, heads = 0, dim = 0, queries = 0;  // dim: 1 to 256 (f32), a multiple of 8 up to 128 (bf16)
  int keys = 0;                                    // of every batch entry, unless cu_lengths is given
  const std::int32_t* cu_lengths = nullptr;  // device [batch + 1]: entry b reads key rows cu[b] .. cu[b + 1]; k_batch 0
  bool settled = false;  // k, v and cu_lengths are there, whatever was launched before is still to do
  int most_keys = 0;     // of a batch entry; 0: not known
  std::int64_t q_batch = 0, q_row = 0, q_head = 0;
  std::int64_t k_batch = 0, k_row = 0, k_head = 0;  // v as k
  std::int64_t out_batch = 0, out_row = 0, out_head = 0;
  float scale = 1;
  float* statistics = nullptr;  // f32 [B, H, n, 2]: largest logit and sum of exp(logit - largest), or null
};
/// out = softmax(scale q k^T) v; no keys: zeros.
void dense_attention(const DenseAttention& args, cudaStream_t stream);
// ---------------------------------------------------------------- attention_lists.cu, attention_hopper.cu
/// Queries rows[first_query ..] that share the list of tile `list`; row r of the output is query r + shift.
struct alignas(16) TileRows {
  static constexpr int kMost = 128;  // queries
  static constexpr int kMostHopper = 192;
  std::int32_t first_query = 0, queries = 0, list = 0, shift = 0;
};
/// A list: keys[first .. first + keys). It begins at a multiple of kAlignment, and what lies up to the next is there to
/// be read.
struct alignas(16) KeyRange {
  static constexpr int kAlignment = 8;
  std::int64_t first = 0;
  std::int32_t keys = 0, unused = 0;
};
/// Logits of queries, in the order that threads of attention_hopper.cu hold them: 64 keys after 64, of which the four
/// eights of either half are those of four threads (logit_choice.cu: key_at).
struct LogitRows {
  static constexpr int kStage = 64;
  static constexpr int kGroup = 8;
  int queries = 0;           // of a head: row i is the logits of ListAttention::rows[i]
  float* logits = nullptr;   // [B * H, queries, stride]; NaN where there is no key
  float* largest = nullptr;  // [B * H, queries, stride / kGroup]: of each group; NaN counts for nothing
  std::int64_t stride = 0;   // a multiple of kStage
};
/// What attention_hopper.cu adds to its outputs, which are the tokens of `to`: the bilinear resize of bf16
/// [B, from.tokens, H, D], as add_resized would.
struct ResizedResidual {
  const void* cache = nullptr;  // null: nothing
  Grid from = {}, to = {};
};
struct ListAttention {
  const void* q = nullptr;  // [B, H, queries, D]
  const void* k = nullptr;  // [B, H, capacity, D]
  const void* v = nullptr;
  void* out = nullptr;  // [B, out_queries, H, D]; queries in no tile keep what it held
  DType type = DType::bf16;
  int batch = 0, heads = 0, dim = 0, queries = 0, out_queries = 0;
  std::int64_t capacity = 0;
  const TileRows* tiles = nullptr;     // device [tile_count]
  const KeyRange* ranges = nullptr;    // device [list_tiles], or [B * H, list_tiles] where every head has its own
  const std::int32_t* rows = nullptr;  // device
  const std::int32_t* keys = nullptr;  // device
  int tile_count = 0, list_tiles = 0;
  int whole_tiles = 0;   // attention_hopper.cu does the first so many of all heads before the others
  int most_queries = 0;  // of a tile
  bool own_lists = false;
  float scale = 1;
  float* statistics = nullptr;  // f32 [B, H, out_queries, 2], or null
  bool hopper = true;           // attention_hopper.cu where it can; false: the kernel of sm_80
  /// What is written of them, where `logits` is given: attention_hopper.cu only, tiles of up to 64 queries, and lists
  /// of keys in a row, where keys[first] is first, a multiple of LogitRows::kStage.
  LogitRows logits = {};
  bool in_order = false;  // what is made of query rows[i] is row i of the output; attention_hopper.cu only
  /// Not 0: lists are whole boxes of so many keys in a row, in boxes of the list, but for the last one, which may end
  /// at keys_end, behind the last key of all. Such keys are fetched by Hopper's copy engine.
  int box_keys = 0;
  int keys_end = 0;
  bool settled = false;  // tiles and ranges were there before the program: they are read before anything is waited for
  ResizedResidual residual = {};
};
/// out = softmax(scale q k^T) v over each tile's keys; no keys: zeros.
void list_attention(const ListAttention& args, cudaStream_t stream);
/// The same on Hopper (attention_hopper.cu), which list_attention takes where it can. It alone takes tiles of more than
/// TileRows::kMost queries.
bool hopper_takes_heads_of(int dim);
void list_attention_hopper(const ListAttention& args, cudaStream_t stream);
/// Puts together attention to `parts` parts of the keys: partial [B, parts * queries, H, D] of `type` and its
/// statistics
/// -> out [B, queries, H, D] of `type`, statistics f32 [B, H, queries, 2].
void merge_parts(const void* partial, const float* partial_statistics, DType type, int batch, int heads, int dim,
                 int queries, int parts, void* out, float* statistics, cudaStream_t stream);

// ---------------------------------------------------------------- column_sums.cu
/// 64 queries that are worked on together: a part of one group, or several whole groups.
struct alignas(16) ColumnStage {
  static constexpr int kQueries = 64;
  enum Kind : std::int32_t { part, last_part, several, single };  // single: each query is a group of its own
  std::int32_t kind = part, group = 0, count = 0, unused = 0;
};
/// sums f32 [B * H, groups, keys] = per group of queries and key the sum of exp(scale q k - largest) / total.
struct ColumnSums {
  const void* q = nullptr;            // [B, H, queries, D]
  const void* k = nullptr;            // [B, H, capacity, D]
  const float* statistics = nullptr;  // [B, H, queries, 2]: (largest, total)
  DType type = DType::bf16;
  int batch = 0, heads = 0, dim = 0, queries = 0, keys = 0;
  std::int64_t capacity = 0;
  const ColumnStage* stages = nullptr;     // device [stage_count], an even number
  const std::int32_t* rows = nullptr;      // device [stage_count, 64]; -1 where there is no query
  const std::int32_t* group_of = nullptr;  // device [stage_count, 64]
  int stage_count = 0, groups = 0;         // sums of empty groups are left as they are
  float scale = 1;
  float* lessening = nullptr;  // scratch [B * H, stage_count, 64]
  float* sums = nullptr;
  bool hopper = true;  // column_sums_hopper.cu where it can
};
void column_sums(const ColumnSums& args, cudaStream_t stream);
/// Of bf16, on Hopper, heads of 64 to 128 channels: which column_sums takes where it can.
void column_sums_hopper(const ColumnSums& args, cudaStream_t stream);

// ---------------------------------------------------------------- key_choice.cu
/// choice I32 [rows, counts[0] + counts[1] + ..]: per row of sums f32 [rows, keys] the counts[0] largest, ascending,
/// then the counts[1] next, and so on; of equal sums the lower index; NaN is least.
constexpr int kMostCounts = 8;
void select_keys(const float* sums, std::int64_t rows, int keys, const int* counts, int count_of_counts,
                 std::int32_t* choice, cudaStream_t stream);
/// Most keys that select_keys takes.
int most_selected_keys();
/// Lists of tiles from choices: tile t of list l reads the first `chosen` keys of choice[l, group_of[t]], each replaced
/// by map[key] where there is a map, and those of its fixed set.
struct BuildLists {
  const std::int32_t* choice = nullptr;  // [lists, groups, per_group]
  int lists = 0, groups = 0, per_group = 0, chosen = 0;
  int tiles = 0, keys = 0;                 // all keys lie below `keys`
  const std::int32_t* group_of = nullptr;  // [tiles]
  const std::int32_t* map = nullptr;       // or null
  const std::uint32_t* fixed = nullptr;    // [tiles, (keys + 31) / 32] bits, or null
  const std::int32_t* queries = nullptr;   // [tiles]: rows of each
  std::int64_t capacity = 0;               // of each list in list_keys
  KeyRange* ranges = nullptr;              // [lists, tiles]
  std::int32_t* list_keys = nullptr;       // [lists, tiles, capacity]
  unsigned long long* pairs = nullptr;     // += queries times keys of every list, or null
  bool staged = true;                      // false: written key by key, as it was at first
};
void build_lists(const BuildLists& args, cudaStream_t stream);

// ---------------------------------------------------------------- logit_choice.cu
/// What select_keys chooses where every group is one query: the keys of its largest logits, in no order.
struct ChooseOfLogits {
  static constexpr int kMostKeys = 12288;
  static constexpr int kMostChosen = 640;
  LogitRows rows;
  int lists = 0, groups = 0, keys = 0;
  int chosen = 0;                        // of `keys`, at most all of them
  const std::int32_t* row_of = nullptr;  // device [groups]: the query of each
  std::int32_t* choice = nullptr;        // [lists, groups, chosen]
};
void choose_of_logits(const ChooseOfLogits& args, cudaStream_t stream);

// ---------------------------------------------------------------- rows.cu
/// out [B, rows, H, D] f32 = rows of x [B, n, H, D] of `type`.
void gather_rows(const void* x, DType type, int batch, int n, std::int64_t width, const std::int32_t* rows, int count,
                 float* out, cudaStream_t stream);
/// out = x - rows of `of` [B, n, width]; x and out [B, rows, width], all of `type`.
void minus_rows(const void* x, const void* of, DType type, int batch, int n, std::int64_t width,
                const std::int32_t* rows, int count, void* out, cudaStream_t stream);
/// out [heads, rows, D] = rows of x [heads, n, D], both of `type`.
void gather_head_rows(const void* x, DType type, std::int64_t heads, int n, int dim, const std::int32_t* rows,
                      int count, void* out, cudaStream_t stream);
/// out [B, tokens of `to`, width] of `type` += bilinear resize (align_corners = false) of cache [B, tokens of `from`,
/// width] of cache_type.
void add_resized(void* out, DType type, const void* cache, DType cache_type, int batch, std::int64_t width,
                 const TokenMap& from, const TokenMap& to, cudaStream_t stream);
/// statistics [count, 2] = (log of the sum of exponentials, 1).
void spread_log_sums(const float* log_sums, std::int64_t count, float* statistics, cudaStream_t stream);
/// Text: q, k, v f32 [T, H, D], bias f32 [H, T, T]; keys >= *length (device) are not seen -> out f32 [T, H, D].
void biased_attention(const float* q, const float* k, const float* v, const float* bias, const std::int32_t* length,
                      int tokens, int heads, int dim, float* out, cudaStream_t stream);

// ---------------------------------------------------------------- feature_map.cu, NHWC
/// Bytes of scratch that group_norm needs.
std::int64_t group_norm_scratch(int batch, std::int64_t pixels, int channels, int groups);
/// x, out [B, pixels, C] of `type`; statistics in f32 over f32 partial sums that do not depend on the number of blocks
/// in flight (the same result every run).
void group_norm(const void* x, DType type, int batch, std::int64_t pixels, int channels, int groups,
                const float* weight, const float* bias, float eps, bool silu, void* scratch, void* out,
                cudaStream_t stream);
void upsample_nearest_2x(const void* x, DType type, int batch, int height, int width, int channels, void* out,
                         cudaStream_t stream);
/// f32 [B, C, pixels] -> [B, pixels, C] of `type`, and back to f32 with values clamped to [-limit, limit].
void planes_to_pixels(const float* x, int batch, int channels, std::int64_t pixels, void* out, DType type,
                      cudaStream_t stream);
void pixels_to_planes(const void* x, DType type, int batch, int channels, std::int64_t pixels, float limit, float* out,
                      cudaStream_t stream);
/// [count] values in [-1, 1] -> floor(255 (x + 1) / 2), clamped; NaN is 0.
void to_bytes(const void* x, DType type, std::int64_t count, std::uint8_t* out, cudaStream_t stream);

// ---------------------------------------------------------------- convolution.cu, convolution_f32.cu
/// y = conv(x, w) + bias (+ residual), NHWC; sums in f32, of f32 inputs without tensor cores.
struct OwnConvolution {
  const void* x = nullptr;         // [batch, height, width, in]
  const void* w = nullptr;         // [out, kernel, kernel, in]
  const float* bias = nullptr;     // [out]
  const void* residual = nullptr;  // of y's shape, or null
  void* y = nullptr;               // [batch, out_height(), out_width(), out]
  DType type = DType::bf16;        // of x, w, residual and y
  int batch = 1, height = 0, width = 0, in = 0, out = 0;
  int kernel = 3;  // 1 or 3
  int stride = 1;
  int pad_begin = 0, pad_end = 0;
  bool enlarged = false;  // x is read as if enlarged twofold by nearest neighbours; height and width are those of x

  constexpr int out_height() const { return ((enlarged ? 2 : 1) * height + pad_begin + pad_end - kernel) / stride + 1; }
  constexpr int out_width() const { return ((enlarged ? 2 : 1) * width + pad_begin + pad_end - kernel) / stride + 1; }
};
void convolution(const OwnConvolution& args, cudaStream_t stream);

}  // namespace sparvar::cuda
