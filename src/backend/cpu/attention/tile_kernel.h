// "A tile of queries attends to its list of keys", written once on GCC vector types and compiled per instruction set.
//
// Queries are the vector lanes: the tile is transposed once to [dim][64 queries], key rows are broadcast from where
// they lie (a gathered key costs nothing extra), so logits come out as [key][query] and softmax needs no horizontal
// step. Values are the lanes of the second product: out[query][dim] += p[key][query] * v[key][dim]. With bf16 dot
// products (SPARVAR_BF16_DOT) a 32-bit lane holds a pair of dims (first product) or of keys (second).
//
// Column sums swap the roles: 64 keys are transposed, query rows are broadcast, and the sum over queries is vertical.
#pragma once

#include <cstdint>
#include <cstring>

#include "attention/key_run.h"
#include "backend/cpu/attention/kernels.h"

#ifdef SPARVAR_BF16_DOT
#include <immintrin.h>
#endif

namespace sparvar {
namespace {

constexpr int kLanes = SPARVAR_LANES;
using VecF = float __attribute__((vector_size(kLanes * 4)));
using VecI = std::int32_t __attribute__((vector_size(kLanes * 4)));
using VecU = std::uint32_t __attribute__((vector_size(kLanes * 4)));
using U16 = std::uint16_t;

constexpr int kQ = kMaxTileQueries;
constexpr int kKeys = 64;     // keys per block
constexpr int kRowBlock = 6;  // broadcast rows per micro step
constexpr int kMaxVectors = SPARVAR_MICRO_VECTORS;
constexpr float kLog2e = 1.44269504088896340736F;

inline VecF splat(float x) { return VecF{} + x; }
inline VecF load(const float* p) {
  VecF x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, VecF x) { std::memcpy(p, &x, sizeof x); }
inline float widen(U16 bits) {
  const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}
inline U16 narrow(float x) {  // round to nearest even
  std::uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  if ((word & 0x7fffffffU) > 0x7f800000U) return static_cast<U16>((word >> 16) | 0x40U);
  return static_cast<U16>((word + 0x7fffU + ((word >> 16) & 1U)) >> 16);
}

/// 2^x for x <= 0; below -126 the result is 2^-126 (nothing, next to the 1 of the largest logit).
inline VecF exp2_negative(VecF x) {
  const VecF lowest = splat(-126.0F);
  x = x > lowest ? x : lowest;
  const VecF magic = splat(12582912.0F);  // 1.5 * 2^23: adding it rounds to an integer
  const VecF shifted = x + magic;
  const VecF f = x - (shifted - magic);
  VecF p = splat(1.535336188319500e-4F);
  p = p * f + 1.339887440266574e-3F;
  p = p * f + 9.618437357674640e-3F;
  p = p * f + 5.550332471162809e-2F;
  p = p * f + 2.402264791363012e-1F;
  p = p * f + 6.931472028550421e-1F;
  p = p * f + 1.0F;
  const VecI exponent = reinterpret_cast<VecI>(shifted) << 23;
  return reinterpret_cast<VecF>(reinterpret_cast<VecI>(p) + exponent);
}

/// How one input type is multiplied. Word: what is broadcast (a float, or a pair of bf16).
struct FloatDot {
  using Row = float;
  using Word = float;
  static constexpr int kPerWord = 1;
  static VecF multiply_add(VecF sum, VecF lanes, const Word* word) { return sum + lanes * *word; }
};
#ifdef SPARVAR_BF16_DOT
struct PairDot {
  using Row = U16;
  using Word = std::uint32_t;
  static constexpr int kPerWord = 2;
  static VecF multiply_add(VecF sum, VecF lanes, const Word* word) {
    std::int32_t pair;  // rows of an odd stride begin between words
    std::memcpy(&pair, word, sizeof pair);
    return reinterpret_cast<VecF>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(lanes),
                                                   reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair))));
  }
};
#endif

/// out[r][0 .. vectors) = sum over words of lanes[w][...] * rows[r][w], for `kRows` rows.
template <typename Dot, int kRows, int kVectors>
inline void logits_step(const typename Dot::Word* const* rows, const float* lanes, int words, float* out) {
  VecF sum[kRows][kVectors] = {};
  for (int w = 0; w < words; ++w) {
    VecF lane[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) lane[v] = load(lanes + w * kQ + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Dot::multiply_add(sum[r][v], lane[v], rows[r] + w);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(out + r * kQ + v * kLanes, sum[r][v]);
}

template <typename Dot, int kVectors>
inline void logits_columns(const typename Dot::Word* const* rows, int count, const float* lanes, int words,
                           float* out) {
  int r = 0;
  for (; r + kRowBlock <= count; r += kRowBlock)
    logits_step<Dot, kRowBlock, kVectors>(rows + r, lanes, words, out + r * kQ);
  for (; r + 2 <= count; r += 2) logits_step<Dot, 2, kVectors>(rows + r, lanes, words, out + r * kQ);
  for (; r < count; ++r) logits_step<Dot, 1, kVectors>(rows + r, lanes, words, out + r * kQ);
}

/// Logits of `count` broadcast rows against `vectors` vectors of lanes.
template <typename Dot>
void logits(const typename Dot::Word* const* rows, int count, const float* lanes, int words, int vectors, float* out) {
  int v = 0;
  for (; v + kMaxVectors <= vectors; v += kMaxVectors)
    logits_columns<Dot, kMaxVectors>(rows, count, lanes + v * kLanes, words, out + v * kLanes);
  for (; v < vectors; ++v) logits_columns<Dot, 1>(rows, count, lanes + v * kLanes, words, out + v * kLanes);
}

/// out[q][0 .. vectors) += sum over key words of p[w][q] * values[w][...]; `kRows` queries.
template <typename Dot, int kRows, int kVectors>
inline void values_step(const typename Dot::Word* p, const float* const* values, std::int64_t first, int words,
                        float* out, int out_stride) {
  VecF sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(out + r * out_stride + v * kLanes);
  for (int w = 0; w < words; ++w) {
    const float* value = values[w] + first;
    VecF lane[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) lane[v] = load(value + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Dot::multiply_add(sum[r][v], lane[v], p + w * kQ + r);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kLanes, sum[r][v]);
}

template <typename Dot, int kVectors>
inline void values_columns(const typename Dot::Word* p, int queries, const float* const* values, int first, int words,
                           float* out, int out_stride) {
  int q = 0;
  for (; q + kRowBlock <= queries; q += kRowBlock)
    values_step<Dot, kRowBlock, kVectors>(p + q, values, first, words, out + q * out_stride + first, out_stride);
  for (; q + 2 <= queries; q += 2)
    values_step<Dot, 2, kVectors>(p + q, values, first, words, out + q * out_stride + first, out_stride);
  for (; q < queries; ++q)
    values_step<Dot, 1, kVectors>(p + q, values, first, words, out + q * out_stride + first, out_stride);
}

template <typename Dot>
void weigh_values(const typename Dot::Word* p, int queries, const float* const* values, int words, float* out,
                  int padded) {
  int first = 0;
  for (; first + kMaxVectors * kLanes <= padded; first += kMaxVectors * kLanes)
    values_columns<Dot, kMaxVectors>(p, queries, values, first, words, out, padded);
  for (; first < padded; first += kLanes) values_columns<Dot, 1>(p, queries, values, first, words, out, padded);
}

/// Scratch memory of one tile.
struct Scratch {
  float* lanes;    // [words][64] transposed tile
  float* logits;   // [kKeys][64]
  float* weights;  // [kKeys][64], or pairs of keys
  float* values;   // [kKeys][padded dim], where values must be converted or padded
  float* keys;     // [kKeys][dim], where keys must be converted
  float* sum;      // [64][padded dim]
  float largest[kQ];
  float total[kQ];
};

inline Scratch carve(std::byte* memory) {
  auto* base = reinterpret_cast<float*>(memory);
  Scratch s;
  s.lanes = base;
  s.logits = s.lanes + kQ * kMaxHeadDim;
  s.weights = s.logits + kKeys * kQ;
  s.values = s.weights + kKeys * kQ;
  s.keys = s.values + kKeys * kMaxHeadDim;
  s.sum = s.keys + kKeys * kMaxHeadDim;
  return s;
}
static_assert((4 * kQ * kMaxHeadDim + 2 * kKeys * kQ) * sizeof(float) <= kAttentionScratchBytes);

/// [row][dim] -> [word][64 lanes], zeros in unused lanes. A row's words are 4 bytes wide whatever they hold.
template <typename Dot, typename Row>
void transpose(const Row* const* rows, int count, int dim, float* lanes) {
  const int words = (dim + Dot::kPerWord - 1) / Dot::kPerWord;
  const int used = (count + kLanes - 1) / kLanes * kLanes;
  for (int w = 0; w < words; ++w) {
    float* line = lanes + w * kQ;
    for (int i = count; i < used; ++i) line[i] = 0.0F;
    for (int i = 0; i < count; ++i) {
      if constexpr (Dot::kPerWord == 2) {
        U16 pair[2] = {rows[i][2 * w], 0};
        if (2 * w + 1 < dim) pair[1] = rows[i][2 * w + 1];
        std::memcpy(line + i, pair, sizeof pair);
      } else if constexpr (sizeof(Row) == 2) {
        line[i] = widen(rows[i][w]);
      } else {
        line[i] = rows[i][w];
      }
    }
  }
}

/// Rows as the broadcast side wants them: in place, or converted (odd bf16 dims: padded) into `converted`.
template <typename Dot, typename Row>
void broadcast_rows(const Row* const* rows, int count, int dim, float* converted, const typename Dot::Word** out) {
  for (int i = 0; i < count; ++i) {
    if constexpr (sizeof(Row) == sizeof(typename Dot::Row)) {
      if (dim % Dot::kPerWord == 0) {
        out[i] = reinterpret_cast<const typename Dot::Word*>(rows[i]);
        continue;
      }
    }
    float* row = converted + i * kMaxHeadDim;
    if constexpr (sizeof(Row) == 2 && Dot::kPerWord == 1) {
      for (int d = 0; d < dim; ++d) row[d] = widen(rows[i][d]);
    } else {
      std::memset(row, 0, static_cast<std::size_t>(dim + 1) * sizeof(Row));
      std::memcpy(row, rows[i], static_cast<std::size_t>(dim) * sizeof(Row));
    }
    out[i] = reinterpret_cast<const typename Dot::Word*>(row);
  }
}

/// Value rows of a block as lanes: [word][padded dim].
template <typename Dot, typename Row>
void value_rows(const Row* const* rows, int count, int dim, int padded, float* converted, const float** out) {
  const int words = (count + Dot::kPerWord - 1) / Dot::kPerWord;
  for (int w = 0; w < words; ++w) {
    float* line = converted + w * padded;
    out[w] = line;
    if constexpr (Dot::kPerWord == 2) {
      const Row* a = rows[2 * w];
      const Row* b = 2 * w + 1 < count ? rows[2 * w + 1] : nullptr;
      auto* words32 = reinterpret_cast<std::uint32_t*>(line);
      if (b != nullptr)
        for (int d = 0; d < dim; ++d)
          words32[d] = static_cast<std::uint32_t>(a[d]) | (static_cast<std::uint32_t>(b[d]) << 16);
      else
        for (int d = 0; d < dim; ++d) words32[d] = a[d];
    } else if constexpr (sizeof(Row) == 2) {
      for (int d = 0; d < dim; ++d) line[d] = widen(rows[w][d]);
    } else {
      if (dim == padded) {
        out[w] = rows[w];
        continue;
      }
      std::memcpy(line, rows[w], static_cast<std::size_t>(dim) * sizeof(float));
    }
    for (int d = dim; d < padded; ++d) line[d] = 0.0F;
  }
}

/// Softmax of one block: logits -> weights, running largest and total updated, sums rescaled where the largest grew.
template <typename Dot>
void softmax_block(Scratch& s, int count, int queries, int padded, float scale_log2) {
  for (int first = 0; first < queries; first += kLanes) {
    const VecF before = load(s.largest + first);
    VecF largest = before;
    for (int i = 0; i < count; ++i) {
      const VecF x = load(s.logits + i * kQ + first);
      largest = x > largest ? x : largest;
    }
    store(s.largest + first, largest);
    const VecF decay = exp2_negative((before - largest) * scale_log2);
    VecF total = load(s.total + first) * decay;
    bool grew = false;
    for (int l = 0; l < kLanes; ++l) grew |= before[l] != largest[l];
    if (grew) {
      for (int l = 0; l < kLanes && first + l < queries; ++l) {
        float* row = s.sum + (first + l) * padded;
        for (int d = 0; d < padded; d += kLanes) store(row + d, load(row + d) * decay[l]);
      }
    }
    for (int i = 0; i < count; i += Dot::kPerWord) {
      const VecF p = exp2_negative((load(s.logits + i * kQ + first) - largest) * scale_log2);
      total += p;
      if constexpr (Dot::kPerWord == 1) {
        store(s.weights + i * kQ + first, p);
      } else {
        VecF next = {};
        if (i + 1 < count) {
          next = exp2_negative((load(s.logits + (i + 1) * kQ + first) - largest) * scale_log2);
          total += next;
        }
        // Positive finite numbers: adding half a unit rounds to nearest.
        const VecU low = (reinterpret_cast<VecU>(p) + 0x8000U) >> 16;
        const VecU high = (reinterpret_cast<VecU>(next) + 0x8000U) & 0xffff0000U;
        store(s.weights + i / 2 * kQ + first, reinterpret_cast<VecF>(low | high));
      }
    }
    store(s.total + first, total);
  }
}

/// The keys of a list, a block at a time.
class RunReader {
 public:
  RunReader(const KeyRun* runs, std::int64_t count) : runs_(runs), end_(runs + count) {}
  template <typename Row>
  int next(const Row* k, std::int64_t k_stride, const Row* v, std::int64_t v_stride, const Row** k_rows,
           const Row** v_rows) {
    int filled = 0;
    while (filled < kKeys && runs_ != end_) {
      const int take = runs_->count - used_ < kKeys - filled ? runs_->count - used_ : kKeys - filled;
      for (int i = 0; i < take; ++i) {
        const std::int64_t key = runs_->begin + used_ + i;
        k_rows[filled + i] = k + key * k_stride;
        v_rows[filled + i] = v + key * v_stride;
      }
      filled += take;
      used_ += take;
      if (used_ == runs_->count) {
        ++runs_;
        used_ = 0;
      }
    }
    return filled;
  }

 private:
  const KeyRun* runs_;
  const KeyRun* end_;
  int used_ = 0;
};

template <typename Row>
void write_tile(const AttendTask& task, const Scratch& s, int padded) {
  for (int i = 0; i < task.row_count; ++i) {
    const float total = s.total[i];
    const float inverse = total > 0.0F ? 1.0F / total : 0.0F;
    Row* out = static_cast<Row*>(task.out) + task.rows[i] * task.out_stride;
    const float* sum = s.sum + i * padded;
    for (int d = 0; d < task.head_dim; ++d) {
      if constexpr (sizeof(Row) == 2)
        out[d] = narrow(sum[d] * inverse);
      else
        out[d] = sum[d] * inverse;
    }
    if (task.statistics != nullptr) {
      task.statistics[2 * task.rows[i]] = s.largest[i] * task.scale;
      task.statistics[2 * task.rows[i] + 1] = total;
    }
  }
}

template <typename Dot, typename Row>
void attend(const AttendTask& task, std::byte* memory) {
  Scratch s = carve(memory);
  const int dim = task.head_dim;
  const int words = (dim + Dot::kPerWord - 1) / Dot::kPerWord;
  const int padded = (dim + kLanes - 1) / kLanes * kLanes;
  const int vectors = (task.row_count + kLanes - 1) / kLanes;
  const float scale_log2 = task.scale * kLog2e;

  const Row* q_rows[kQ];
  for (int i = 0; i < task.row_count; ++i) q_rows[i] = static_cast<const Row*>(task.q) + task.rows[i] * task.q_stride;
  transpose<Dot>(q_rows, task.row_count, dim, s.lanes);
  std::memset(s.sum, 0, static_cast<std::size_t>(task.row_count * padded) * sizeof(float));
  for (int i = 0; i < kQ; ++i) {
    s.largest[i] = -3.0e38F;
    s.total[i] = 0.0F;
  }

  RunReader reader(task.runs, task.run_count);
  const Row* k_rows[kKeys];
  const Row* v_rows[kKeys];
  const typename Dot::Word* k_words[kKeys];
  const float* v_lanes[kKeys];
  while (const int count = reader.next(static_cast<const Row*>(task.k), task.k_stride, static_cast<const Row*>(task.v),
                                       task.v_stride, k_rows, v_rows)) {
    broadcast_rows<Dot>(k_rows, count, dim, s.keys, k_words);
    logits<Dot>(k_words, count, s.lanes, words, vectors, s.logits);
    softmax_block<Dot>(s, count, task.row_count, padded, scale_log2);
    value_rows<Dot>(v_rows, count, dim, padded, s.values, v_lanes);
    weigh_values<Dot>(reinterpret_cast<const typename Dot::Word*>(s.weights), task.row_count, v_lanes,
                      (count + Dot::kPerWord - 1) / Dot::kPerWord, s.sum, padded);
  }
  write_tile<Row>(task, s, padded);
}

/// Adds the probabilities of `count` queries, whose logits are in s.logits, to the sums of the group.
inline void add_probabilities(const Scratch& s, const ColumnTask& task, const std::int32_t* rows, int count,
                              float* sums) {
  const int vectors = (task.key_count + kLanes - 1) / kLanes;
  for (int v = 0; v < vectors; ++v) {
    VecF sum = load(sums + v * kLanes);
    for (int i = 0; i < count; ++i) {
      const float largest = task.statistics[2 * rows[i]];
      const float total = task.statistics[2 * rows[i] + 1];
      const float inverse = total > 0.0F ? 1.0F / total : 0.0F;
      const VecF x = (load(s.logits + i * kQ + v * kLanes) * task.scale - largest) * kLog2e;
      const VecF zero = {};
      sum += exp2_negative(x < zero ? x : zero) * inverse;
    }
    store(sums + v * kLanes, sum);
  }
}

template <typename Dot, typename Row>
void columns(const ColumnTask& task, std::byte* memory) {
  Scratch s = carve(memory);
  const int dim = task.head_dim;
  const int words = (dim + Dot::kPerWord - 1) / Dot::kPerWord;
  const int vectors = (task.key_count + kLanes - 1) / kLanes;
  const Row* rows[kQ];
  const typename Dot::Word* row_words[kQ];
  for (int i = 0; i < task.key_count; ++i) rows[i] = static_cast<const Row*>(task.k) + i * task.k_stride;
  transpose<Dot>(rows, task.key_count, dim, s.lanes);
  float sums[kColumnKeys];
  for (int g = 0; g < task.group_count; ++g) {
    std::memset(sums, 0, sizeof sums);
    for (int first = task.group_offset[g]; first < task.group_offset[g + 1]; first += kQ) {
      const int count = task.group_offset[g + 1] - first < kQ ? task.group_offset[g + 1] - first : kQ;
      const std::int32_t* ids = task.group_rows + first;
      for (int i = 0; i < count; ++i) rows[i] = static_cast<const Row*>(task.q) + ids[i] * task.q_stride;
      broadcast_rows<Dot>(rows, count, dim, s.keys, row_words);
      logits<Dot>(row_words, count, s.lanes, words, vectors, s.logits);
      add_probabilities(s, task, ids, count, sums);
    }
    std::memcpy(task.out + g * task.out_stride, sums, static_cast<std::size_t>(task.key_count) * sizeof(float));
  }
}

#ifdef SPARVAR_BF16_DOT
using Bf16Dot = PairDot;
#else
using Bf16Dot = FloatDot;
#endif

constexpr AttentionKernels kKernels = {SPARVAR_ISA_NAME, attend<FloatDot, float>, attend<Bf16Dot, U16>,
                                       columns<FloatDot, float>, columns<Bf16Dot, U16>};

}  // namespace
}  // namespace sparvar
