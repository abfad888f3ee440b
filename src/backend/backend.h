// The operations models are written in. models/ never names a device; a device implements this header.
// Tensors are contiguous and live where the backend computes (upload, download). "compute type" is bf16 or f32: the
// type of matrix-product inputs and of the KV cache; sums, norms and the residual stream are f32. Pictures and feature
// maps are NHWC. On a device that records programs, operations are enqueued and return at once.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "attention/key_lists.h"
#include "attention/token_order.h"
#include "core/tensor.h"
#include "sparvar/error.h"

namespace sparvar {

enum class Activation { none, gelu_tanh, silu };

/// Weights of y = x W^T + b, packed for the device. W is [out, in].
class Linear {
 public:
  virtual ~Linear() = default;
  std::int64_t in = 0;
  std::int64_t out = 0;
  DType input = DType::f32;  // type that x is best given in; others are converted
};
using LinearPtr = std::shared_ptr<Linear>;

/// What the numbers of a layer may be.
enum class LinearKind {
  plain,    // the compute type
  precise,  // f32 whatever the compute type: small layers that everything after them hangs on
  narrow,   // 8 bits where the backend was made for them and the layer's sizes allow, else as plain; W may be e4m3
};

/// Weights of a 2-D convolution. Padding in pixels: top/left and bottom/right may differ (the encoder's stride-2 form).
class Convolution {
 public:
  virtual ~Convolution() = default;
  std::int64_t in = 0;
  std::int64_t out = 0;
  int kernel = 3;
  int stride = 1;
  int pad_begin = 1;
  int pad_end = 1;
};
using ConvolutionPtr = std::shared_ptr<Convolution>;

/// Buffers of one attention call. q [B, H, n, D], k and v [B, H, capacity, D] (compute type, D contiguous; of the
/// capacity the lists say which rows are read), out [B, n, H, D] (compute type).
struct AttentionArgs {
  Tensor q;
  Tensor k;
  Tensor v;
  Tensor out;
  float scale = 1.0F;
  /// Optional f32 [B, H, n, 2]: per query (m, s) so that its probabilities are exp(logit - m) / s: the largest logit
  /// and the sum, or the logarithm of the whole sum and 1.
  Tensor statistics;
};

/// Tiles of queries and their lists of keys, as a device wants them.
class AttentionLists {
 public:
  virtual ~AttentionLists() = default;
};
using AttentionListsPtr = std::shared_ptr<AttentionLists>;

/// A ListRecipe as a device wants it.
class AttentionRecipe {
 public:
  virtual ~AttentionRecipe() = default;
};
using AttentionRecipePtr = std::shared_ptr<AttentionRecipe>;

/// How q and k are made from the qkv product (SelfAttention of upstream basic.py).
struct QkvArgs {
  int heads = 0;
  bool l2_norm = true;      // q, k to unit length per head (cos_attn)
  Tensor head_scale;        // f32 [H]: q is multiplied by it
  Tensor rope;              // f32 [n, D/2, 2]: (cos, sin) per pair (2i, 2i+1); undefined: no rotation
  std::int64_t offset = 0;  // first row of this scale in the cache
};

/// LayerNorm(x) * (one_plus + scale[g]) + shift[g]: scale and shift f32 [G, C] serve the G equal parts of x's rows;
/// undefined: 1 and 0.
struct NormArgs {
  Tensor scale;
  Tensor shift;
  float one_plus = 0.0F;  // 1 for a modulation, whose scale is a difference from 1
  float eps = 1e-6F;
  DType out = DType::f32;  // or bf16, or the `input` of the layer that reads it
  bool settled = false;    // scale, shift and gate are weights, or results of a program before this one
};

/// A text as a layer's cross attention reads it, with the layer's projections of queries and outputs taken into its
/// keys and values (Backend::fold_text): (W_q x) k = x (W_q^T k) once for the text instead of W_q x for every token.
struct FoldedText {
  Tensor keys;    // [B, H * length, C]: W_q^T k of each head and token, 0 beyond the text
  Tensor bias;    // f32 [B, H * length]: b_q k
  Tensor values;  // [B, H * length, C]: W_o v
};

/// A fixed sequence of operations on fixed tensors. Values of the tensors may change between runs, nothing else.
class Program {
 public:
  virtual ~Program() = default;
  virtual void run() = 0;
};
using ProgramPtr = std::unique_ptr<Program>;

/// A moment between two operations.
class Mark {
 public:
  virtual ~Mark() = default;
  /// Waits until this mark was passed. `earlier` is one of the same backend.
  virtual double seconds_since(const Mark& earlier) const = 0;
};
using MarkPtr = std::unique_ptr<Mark>;

/// Bytes a backend has taken, or will take, of its device. All zero where that is not planned (the CPU).
struct MemoryUse {
  std::int64_t weights = 0;
  std::int64_t working = 0;      // the largest sum of KV cache and activations
  std::int64_t device_free = 0;  // when the backend was made
  std::int64_t device_total = 0;
  std::int64_t device_taken = 0;  // by everybody, since the backend was made
};

/// A matrix product whose algorithms were measured: x [rows, in] times W [out, in] transposed.
struct ProductTime {
  std::int64_t rows = 0, in = 0, out = 0;
  double seconds = 0;
};

/// Which of a library's algorithms large products take, beyond the life of a process. Words are the library's.
class ProductChoices {
 public:
  struct Choice {
    std::array<std::uint64_t, 8> algorithm = {};
    double seconds = 0;
    bool operator==(const Choice&) const = default;
  };
  virtual ~ProductChoices() = default;
  /// Of `product` on `machine`, which are any two lines of text.
  virtual std::optional<Choice> find(const std::string& machine, const std::string& product) const = 0;
  /// Keeps it for others, unless another process has kept one since, which is then returned. Replaces one that find()
  /// gives.
  virtual Choice keep(const std::string& machine, const std::string& product, const Choice& choice) = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual DType compute_type() const = 0;
  virtual std::string describe() const = 0;  // e.g. "cpu, avx512-bf16, 2 threads"
  /// Why these instructions and no others, in one line; empty where there is no choice.
  virtual std::string why() const { return {}; }

  // ---- running
  /// Programs are recorded at their first run and replayed afterwards; work is asynchronous.
  virtual bool records() const = 0;
  /// `body` may be called at every run, or once.
  virtual ProgramPtr program(std::function<void()> body) = 0;
  virtual MarkPtr mark() = 0;
  /// Calls `bodies` without computing, to find and take the memory that they need and to choose algorithms. Tensors
  /// made in it must not be read. No-op on the CPU.
  virtual void reserve(const std::function<void()>& bodies) = 0;
  virtual MemoryUse memory_use() const = 0;
  /// Programs recorded so far; 0 on a device that does not record.
  virtual int recordings() const = 0;
  /// What reserve() measured so far; empty on the CPU.
  virtual std::vector<ProductTime> product_times() const = 0;
  /// Lengths that programs are made for are rounded up to a multiple of this.
  virtual int length_step() const = 0;
  /// Type of a product that one more operation reads and rounds.
  virtual DType product_type() const = 0;

  // ---- on a stream and in memory of somebody else
  /// Bytes of working memory that `body` takes at its largest. It is called without computing. 0 on the CPU.
  virtual std::int64_t working_bytes(const std::function<void()>& body);
  /// `body` with its work enqueued on `stream` (a stream of the device; null: its default one) and with its working
  /// memory in `memory`, of at least working_bytes(body). What it makes must be gone when it returns. On the CPU:
  /// body().
  virtual void run_on(void* stream, void* memory, std::int64_t bytes, const std::function<void()>& body);

  // ---- tensors
  virtual Tensor empty(DType dtype, Shape shape) = 0;
  virtual Tensor zeros(DType dtype, Shape shape) = 0;
  /// Normal numbers of the deviation, a function of seed and index alone on one device.
  virtual Tensor random(DType dtype, Shape shape, std::uint64_t seed, float deviation) = 0;
  virtual Tensor upload(const Tensor& host) = 0;      // not inside a program; may share the host's memory
  virtual Tensor download(const Tensor& tensor) = 0;  // not inside a program; waits; may share memory
  /// Values of `from` (host or device, same type and size) into `to`. From the host: not inside a program.
  virtual void write(Tensor& to, const Tensor& from) = 0;
  virtual void fill_zero(Tensor& x) = 0;
  virtual Tensor clone(const Tensor& x) = 0;
  /// `times` copies of x one after the other: [rows, ...] -> [times * rows, ...].
  virtual Tensor repeat(const Tensor& x, int times) = 0;

  // ---- weights
  /// Bias may be undefined.
  virtual LinearPtr prepare_linear(const Tensor& weight, const Tensor& bias, LinearKind kind = LinearKind::plain) = 0;
  virtual ConvolutionPtr prepare_convolution(const Tensor& weight_oihw, const Tensor& bias, int stride, int pad_begin,
                                             int pad_end) = 0;

  // ---- dense layers
  /// act(x W^T + b): x [rows, in] (f32, compute type or weights.input) -> [rows, out] of type `out`: f32, compute type
  /// or the `input` of the layer that reads it.
  virtual Tensor linear(const Tensor& x, const Linear& weights, Activation activation, DType out) = 0;
  /// residual[g] += gate[g] * y[g]: residual f32 [B, n, C], gate f32 [G, C] for G equal parts of its rows, or undefined
  /// (1), y f32 or compute type.
  virtual void add_gated(Tensor& residual, const Tensor& y, const Tensor& gate) = 0;
  /// x f32 [..., C] -> args.out.
  virtual Tensor layer_norm(const Tensor& x, const NormArgs& args) = 0;
  /// add_gated, then layer_norm of the sum.
  virtual Tensor add_gated_norm(Tensor& residual, const Tensor& y, const Tensor& gate, const NormArgs& args) = 0;
  /// x / sqrt(mean(x^2) + eps) * weight; x f32 [rows, C] -> type `out`.
  virtual Tensor rms_norm(const Tensor& x, const Tensor& weight, float eps, DType out) = 0;
  virtual Tensor apply(const Tensor& x, Activation activation) = 0;  // f32 -> f32
  /// x += y, repeated: x f32 [..., y's shape].
  virtual void add_repeated(Tensor& x, const Tensor& y) = 0;
  /// shared f32 [rows, parts * C] + own f32 [parts, C] (may be undefined) -> f32 [parts, rows, C].
  virtual Tensor modulation(const Tensor& shared, const Tensor& own, int parts) = 0;

  // ---- guidance; `guidance` f32 [1, 2]: (cfg, 1 / tau)
  /// x f32 [2 B, n, C], in place: both halves become cfg * first + (1 - cfg) * second.
  virtual void guide_hidden(Tensor& x, const Tensor& guidance) = 0;
  /// logits f32 [B or 2 B, n, 2 * bits] -> [pictures, n, 2 * bits]: divided by tau, halves mixed where there are two.
  virtual Tensor guide_logits(const Tensor& logits, std::int64_t pictures, const Tensor& guidance) = 0;

  // ---- bits (src/bits)
  /// `sampling`: of SamplingWords, I64 [4]. logits f32 [B, n, 2 * bits] -> U8 [B, n, bits].
  virtual Tensor sample_bits(const Tensor& logits, const Tensor& sampling, int scale) = 0;
  /// summed f32 [B, d, H, W] += codes of `bits` of a token grid, resized.
  virtual void add_codes(Tensor& summed, const Tensor& bits, Grid tokens, bool patchify) = 0;
  virtual Tensor codes_to_words(const Tensor& summed, Grid tokens, bool patchify) = 0;

  // ---- attention
  /// Splits qkv [B, n, 3, H, D], normalises, scales and rotates q and k; q goes to `q` [B, H, n, D], k and v to rows
  /// [offset, offset + n) of the caches [B, H, capacity, D].
  virtual void split_qkv(const Tensor& qkv, const QkvArgs& args, Tensor& q, Tensor& k_cache, Tensor& v_cache) = 0;
  /// A copy of a cache [B, H, capacity, D] with room for `more` rows a head.
  virtual Tensor grown(const Tensor& cache, std::int64_t more) = 0;
  /// Every query attends to keys [0, keys).
  virtual void dense_attention(AttentionArgs& args, int keys) = 0;
  /// Every tile of queries attends to its list of keys. Queries in no tile keep
  /// what `out` held; empty lists give zeros.
  virtual void attention(AttentionArgs& args, const QueryTiles& tiles, const KeyLists& lists) = 0;
  /// The same with lists that many calls share; a recorded program takes no others.
  virtual AttentionListsPtr prepare_lists(const QueryTiles& tiles, const KeyLists& lists) = 0;
  virtual void attention(AttentionArgs& args, const AttentionLists& lists) = 0;
  /// choice I32 [lists, groups, counts[0]] = of f32 sums [lists, groups, keys] the counts[0] largest of each (list,
  /// group), so ordered that of the smaller counts (they descend) the largest come first. Of equal sums the lower key;
  /// NaN is least.
  virtual void select_keys(const Tensor& sums, const std::vector<int>& counts, Tensor& choice) = 0;
  /// dense_attention of some rows of the queries, all where `rows` is empty, with statistics, and select_keys of the
  /// column_sums of `groups` of those: out and statistics have a row for each of them, groups count them. Where every
  /// group is one query a device may choose by logits, so that keys whose probabilities round to the same number
  /// differ too.
  virtual void attend_and_choose(AttentionArgs& args, const std::vector<std::int32_t>& rows, const QueryTiles& groups,
                                 int keys, const std::vector<int>& counts, Tensor& choice) {
    AttentionArgs some = args;
    if (!rows.empty()) some.q = gather_queries(args.q, rows);
    dense_attention(some, keys);
    select_keys(column_sums(some, groups, keys), counts, choice);
  }
  virtual AttentionRecipePtr prepare_recipe(const ListRecipe& recipe) = 0;
  /// Every tile attends to its list, made of `choice` I32 [B * H, groups, per group]. Adds to `pairs` (I64 [1], may be
  /// undefined) the pairs of query and key computed.
  virtual void attention(AttentionArgs& args, const AttentionRecipe& recipe, const Tensor& choice, Tensor& pairs) = 0;
  /// The same, and add_resized of `cache` to its output.
  virtual void attention_with_residual(AttentionArgs& args, const AttentionRecipe& recipe, const Tensor& choice,
                                       Tensor& pairs, const Tensor& cache, const TokenMap& from, const TokenMap& to) {
    attention(args, recipe, choice, pairs);
    add_resized(args.out, cache, from, to);
  }
  /// f32 [B * H, groups, keys]: per group of queries and key, the sum of softmax probabilities over all `keys` keys.
  virtual Tensor column_sums(const AttentionArgs& args, const QueryTiles& groups, int keys) = 0;
  /// out [B, tokens of `to`, H, D] += bilinear resize (align_corners = false) of cache [B, tokens of `from`, H, D], f32
  /// or product_type(); each map in its order.
  virtual void add_resized(Tensor& out, const Tensor& cache, const TokenMap& from, const TokenMap& to) = 0;
  /// Rows of x [B, n, H, D] -> f32 [B, rows, H, D].
  virtual Tensor gather_rows(const Tensor& x, const std::vector<std::int32_t>& rows) = 0;
  /// Rows of x [B, H, n, D] -> [B, H, rows, D] of x's type.
  virtual Tensor gather_queries(const Tensor& x, const std::vector<std::int32_t>& rows) = 0;
  /// x - rows of `of` [B, n, H, D] -> product_type(); x [B, rows, H, D].
  virtual Tensor minus_rows(const Tensor& x, const Tensor& of, const std::vector<std::int32_t>& rows) {
    Tensor out = empty(product_type(), x.shape());
    subtract(x, gather_rows(of, rows), out);
    return out;
  }
  /// out = a - b, of any float types.
  virtual void subtract(const Tensor& a, const Tensor& b, Tensor& out) = 0;
  /// Attention over short packed texts: q [B, n, H, D], kv [total, 2, H, D] (type of q), cu_lengths I32 [B + 1] -> [B,
  /// n, H, D]. No text is longer than `longest`, where that is not 0. `settled`: kv and cu_lengths are results of a
  /// program before this one.
  virtual Tensor cross_attention(const Tensor& q, const Tensor& kv, const Tensor& cu_lengths, std::int64_t longest,
                                 float scale, bool settled) = 0;
  /// From how many rows of x on cross attention to `texts` texts of up to `longest` tokens is faster when they are
  /// folded; 0: never. They are not where they would be more numbers than the weights that they stand for.
  virtual std::int64_t folded_rows(const Linear& /*query*/, const Linear& /*out*/, int /*heads*/,
                                   std::int64_t /*texts*/, std::int64_t /*longest*/) const {
    return 0;
  }
  /// kv as of cross_attention; `query` and `out`: the layer's projections.
  virtual FoldedText fold_text(const Tensor& /*kv*/, const Tensor& /*cu_lengths*/, std::int64_t /*longest*/,
                               const Linear& /*query*/, const Linear& /*out*/) {
    throw Error(ErrorKind::usage, "this device does not fold texts");
  }
  /// x [B, n, C] -> [B, n, C] of type `out`: linear(cross_attention(linear(x, query), kv), projection) of the text's
  /// kv.
  virtual Tensor folded_cross_attention(const Tensor& /*x*/, const FoldedText& /*text*/, const Tensor& /*cu_lengths*/,
                                        int /*heads*/, const Linear& /*projection*/, float /*scale*/, DType /*out*/) {
    throw Error(ErrorKind::usage, "this device does not fold texts");
  }
  /// Text self attention, one text: q, k, v [T, H, D] f32, bias f32 [H, T, T] added to the logits; keys from *length
  /// (I32 [1]) on are not seen -> f32 [T, H, D].
  virtual Tensor biased_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                                  const Tensor& length) = 0;
  /// gelu_tanh(a) * b, elementwise, f32.
  virtual Tensor gated_gelu(const Tensor& a, const Tensor& b) = 0;

  // ---- feature maps, NHWC
  /// x [B, H, W, in] (f32 or compute type) -> [B, H', W', out] compute type. `residual` (same shape as the result) is
  /// added where defined.
  virtual Tensor convolution(const Tensor& x, const Convolution& weights, const Tensor& residual) = 0;
  virtual Tensor upsample_nearest_2x(const Tensor& x) = 0;
  /// A convolution (3x3, stride 1) of x enlarged twofold, nearest neighbours.
  virtual Tensor upsampled_convolution(const Tensor& x, const Convolution& weights) = 0;
  /// GroupNorm (affine), then SiLU where asked; statistics in f32.
  virtual Tensor group_norm(const Tensor& x, int groups, const Tensor& weight, const Tensor& bias, float eps,
                            bool silu) = 0;
  /// f32 [B, C, H, W] -> [B, H, W, C] f32, and back from f32 or compute type with values clamped to [-limit, limit].
  virtual Tensor to_nhwc(const Tensor& x) = 0;
  virtual Tensor to_nchw(const Tensor& x, float limit) = 0;
  /// [-1, 1] -> U8, floor(255 (x + 1) / 2), clamped; NaN is 0.
  virtual Tensor to_bytes(const Tensor& x) = 0;

 protected:
  /// Throws Error(usage) where `choice` is not what select_keys writes.
  static void require_choice(const Tensor& choice, std::int64_t lists, std::int64_t groups, int count) {
    const Shape expected{lists, groups, count};
    if (choice.dtype() != DType::i32 || choice.shape() != expected)
      throw Error(ErrorKind::usage,
                  "a choice of keys " + to_string(choice.shape()) + ", expected I32 " + to_string(expected));
  }
};

inline std::int64_t Backend::working_bytes(const std::function<void()>&) { return 0; }
inline void Backend::run_on(void*, void*, std::int64_t, const std::function<void()>& body) { body(); }

struct CpuOptions {
  DType compute = DType::bf16;
  int threads = 0;  // 0: all cores
};
std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options);

struct CudaOptions {
  DType compute = DType::bf16;
  int device = 0;
  /// Layers of LinearKind::narrow multiply e4m3 numbers; Hopper only, with compute = bf16.
  bool fp8 = false;
  /// Computes nothing and takes no memory: everything made with it only adds up what would be needed (memory_use()).
  bool planning = false;
  /// false: on Hopper too, attend to lists of keys with the kernel of sm_80, to test and compare it.
  bool hopper = true;
  /// Null: products take the fastest algorithm that gives the bits of the library's favourite.
  std::shared_ptr<ProductChoices> choices = {};
  /// Kernels that newer ones replace, to test and time both.
  struct Older {
    bool choice = false;    // a single query chooses its keys by column sums, not by its logits
    bool dense = false;     // dense attention of many queries is cuDNN's where it is there
    bool epilogue = false;  // a resized residual is added by a kernel of its own
    bool residual = false;  // rows are gathered, then subtracted
    bool boxes = false;     // keys in a row are gathered like any other
    bool lists = false;     // lists of a choice are written key by key
    bool text = false;      // no texts are folded
  } older = {};
};
/// Null where this build has no CUDA or the machine no such GPU; `why` then says so in one line.
std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options, std::string& why);

}  // namespace sparvar
