// Attention: q, k, v out of the projection, dense attention by our kernels or cuDNN's, texts.
#include <fmt/format.h>

#include <algorithm>

#include "backend/cuda/check.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
void check_args(const AttentionArgs& args, int keys) {
  const std::int64_t dim = args.q.dim(-1);
  if (args.k.shape() != args.v.shape() || args.k.dim(0) != args.q.dim(0) || args.k.dim(1) != args.q.dim(1) ||
      args.k.dim(3) != dim || args.k.dtype() != args.q.dtype() || args.v.dtype() != args.q.dtype() ||
      keys > args.k.dim(2))
    throw Error(ErrorKind::usage,
                fmt::format("attention: q {} {}, k {} {}, v {} {} and {} keys do not fit each other",
                            name_of(args.q.dtype()), to_string(args.q.shape()), name_of(args.k.dtype()),
                            to_string(args.k.shape()), name_of(args.v.dtype()), to_string(args.v.shape()), keys));
}

namespace {

Cudnn::AttentionShape cudnn_shape(const DenseAttention& a) {
  return {.batch = a.batch,
          .heads = a.heads,
          .queries = a.queries,
          .keys = a.keys,
          .dim = a.dim,
          .q_batch = a.q_batch,
          .q_row = a.q_row,
          .q_head = a.q_head,
          .k_batch = a.k_batch,
          .k_row = a.k_row,
          .k_head = a.k_head,
          .out_batch = a.out_batch,
          .out_row = a.out_row,
          .out_head = a.out_head,
          .scale = a.scale,
          .statistics = a.statistics != nullptr};
}

/// Below this many multiply-adds attention.cu is as fast; and a model this narrow is done before cuDNN has started.
constexpr double kMuchWork = 2e8;
constexpr std::int64_t kNarrow = 512;  // heads times channels of a head
/// So few queries of each head do not fill a GPU: their keys are shared out.
constexpr std::int64_t kFewQueries = 256;
constexpr int kManyKeys = 1024;

}  // namespace

bool shares_out_keys(const AttentionArgs& args, int keys) {
  return args.statistics.defined() && args.statistics.dim(2) <= kFewQueries && keys >= kManyKeys;
}

void CudaBackend::split_qkv(const Tensor& qkv, const QkvArgs& args, Tensor& q, Tensor& k_cache, Tensor& v_cache) {
  if (qkv.rank() != 5 || qkv.dim(2) != 3 || qkv.dim(3) != args.heads || args.offset + qkv.dim(1) > k_cache.dim(2))
    throw Error(ErrorKind::usage,
                fmt::format("qkv of shape {} does not fit {} heads and a cache of shape {} from row {}",
                            to_string(qkv.shape()), args.heads, to_string(k_cache.shape()), args.offset));
  if (!computes()) return;
  cuda::split_qkv({.qkv = qkv.raw(),
                   .qkv_type = qkv.dtype(),
                   .batch = static_cast<int>(qkv.dim(0)),
                   .n = static_cast<int>(qkv.dim(1)),
                   .heads = args.heads,
                   .dim = static_cast<int>(qkv.dim(4)),
                   .l2_norm = args.l2_norm,
                   .head_scale = args.head_scale.defined() ? args.head_scale.data<float>() : nullptr,
                   .rope = args.rope.defined() ? args.rope.data<float>() : nullptr,
                   .q = q.raw(),
                   .k = k_cache.raw(),
                   .v = v_cache.raw(),
                   .out_type = q.dtype(),
                   .capacity = k_cache.dim(2),
                   .offset = args.offset,
                   .settled = recording_},
                  stream_);
}

Tensor CudaBackend::grown(const Tensor& cache, std::int64_t more) {
  Shape shape = cache.shape();
  shape[2] += more;
  Tensor out = empty(cache.dtype(), shape);
  if (computes())
    copy_into_larger(cache.raw(), cache.dim(2), out.raw(), shape[2], shape[0] * shape[1],
                     shape[3] * static_cast<std::int64_t>(size_of(cache.dtype())), stream_);
  return out;
}

/// `out`: f32, what the output holds before.
void CudaBackend::attend_in_f32(AttentionArgs& args, Tensor out, const std::function<void(AttentionArgs&)>& attend) {
  AttentionArgs wide{.q = converted(args.q, DType::f32),
                     .k = converted(args.k, DType::f32),
                     .v = converted(args.v, DType::f32),
                     .out = std::move(out),
                     .scale = args.scale,
                     .statistics = args.statistics};
  attend(wide);
  if (computes()) convert(wide.out.raw(), DType::f32, args.out.raw(), DType::bf16, wide.out.size(), stream_);
}

void CudaBackend::dense_attention(AttentionArgs& args, int keys) {
  check_args(args, keys);
  const std::int64_t heads = args.q.dim(1);
  const std::int64_t queries = args.q.dim(2);
  const std::int64_t dim = args.q.dim(3);
  const std::int64_t capacity = args.k.dim(2);
  if (args.q.dtype() == DType::bf16 && !fits_tensor_cores(dim))
    return attend_in_f32(args, empty(DType::f32, args.out.shape()),
                         [&](AttentionArgs& wide) { dense_attention(wide, keys); });
  const DenseAttention call{.q = args.q.raw(),
                            .k = args.k.raw(),
                            .v = args.v.raw(),
                            .out = args.out.raw(),
                            .type = args.q.dtype(),
                            .batch = static_cast<int>(args.q.dim(0)),
                            .heads = static_cast<int>(heads),
                            .dim = static_cast<int>(dim),
                            .queries = static_cast<int>(queries),
                            .keys = keys,
                            .cu_lengths = nullptr,
                            .most_keys = keys,
                            .q_batch = heads * queries * dim,
                            .q_row = dim,
                            .q_head = queries * dim,
                            .k_batch = heads * capacity * dim,
                            .k_row = dim,
                            .k_head = capacity * dim,
                            .out_batch = queries * heads * dim,
                            .out_row = heads * dim,
                            .out_head = dim,
                            .scale = args.scale,
                            .statistics = args.statistics.defined() ? args.statistics.data<float>() : nullptr};
  const double work = static_cast<double>(call.batch * heads) * static_cast<double>(queries) * keys * dim;
  if (shares_out_keys(args, keys)) return attend_in_parts(args, keys);
  if (const int tile = work >= kMuchWork ? tile_for_all_keys(args, keys) : 0; tile > 0)
    return attend_parts(args, call.queries, keys, 1, tile);
  const bool worth_cudnn = call.type == DType::bf16 && work >= kMuchWork && heads * dim > kNarrow;
  if (!planning_ && worth_cudnn && cudnn() != nullptr) {
    const Cudnn::AttentionShape shape = cudnn_shape(call);
    if (cudnn()->supports_attention(shape)) {
      Tensor scratch = empty(DType::u8, {cudnn()->attention_workspace(shape)});
      Tensor log_sums;
      if (shape.statistics) log_sums = empty(DType::f32, {call.batch, heads, queries});
      if (!computes()) return;
      cudnn()->attention(shape, call.q, call.k, call.v, args.out.raw(),
                         shape.statistics ? log_sums.data<float>() : nullptr, scratch.raw());
      if (shape.statistics) spread_log_sums(log_sums.data<float>(), log_sums.size(), call.statistics, stream_);
      return;
    }
  }
  if (computes()) cuda::dense_attention(call, stream_);
}

Tensor CudaBackend::cross_attention(const Tensor& q, const Tensor& kv, const Tensor& cu_lengths, std::int64_t longest,
                                    float scale, bool settled) {
  const std::int64_t n = q.dim(1);
  const std::int64_t heads = q.dim(2);
  const std::int64_t dim = q.dim(3);
  const std::int64_t width = heads * dim;
  if (cu_lengths.size() != q.dim(0) + 1 || kv.size() != kv.dim(0) * 2 * width || kv.dtype() != q.dtype())
    throw Error(ErrorKind::usage, fmt::format("cross attention: queries {} do not fit keys {} of {} texts",
                                              to_string(q.shape()), to_string(kv.shape()), cu_lengths.size() - 1));
  if (q.dtype() == DType::bf16 && !fits_tensor_cores(dim))
    return converted(
        cross_attention(converted(q, DType::f32), converted(kv, DType::f32), cu_lengths, longest, scale, false),
        q.dtype());
  Tensor out = empty(q.dtype(), q.shape());
  if (!computes()) return out;
  const auto* keys = kv.data<std::byte>();
  cuda::dense_attention({.q = q.raw(),
                         .k = keys,
                         .v = keys + width * static_cast<std::int64_t>(size_of(kv.dtype())),
                         .out = out.raw(),
                         .type = q.dtype(),
                         .batch = static_cast<int>(q.dim(0)),
                         .heads = static_cast<int>(heads),
                         .dim = static_cast<int>(dim),
                         .queries = static_cast<int>(n),
                         .keys = 0,
                         .cu_lengths = cu_lengths.data<std::int32_t>(),
                         .settled = settled && recording_,
                         .most_keys = static_cast<int>(longest),
                         .q_batch = n * width,
                         .q_row = width,
                         .q_head = dim,
                         .k_batch = 0,
                         .k_row = 2 * width,
                         .k_head = dim,
                         .out_batch = n * width,
                         .out_row = width,
                         .out_head = dim,
                         .scale = scale,
                         .statistics = nullptr},
                        stream_);
  return out;
}

Tensor CudaBackend::biased_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                                     const Tensor& length) {
  const std::int64_t tokens = q.dim(0);
  const std::int64_t heads = q.dim(1);
  if (bias.shape() != Shape{heads, tokens, tokens})
    throw Error(ErrorKind::usage, fmt::format("attention bias: expected {}, found {}",
                                              to_string({heads, tokens, tokens}), to_string(bias.shape())));
  Tensor out = empty(DType::f32, q.shape());
  if (computes())
    cuda::biased_attention(q.data<float>(), k.data<float>(), v.data<float>(), bias.data<float>(),
                           length.data<std::int32_t>(), static_cast<int>(tokens), static_cast<int>(heads),
                           static_cast<int>(q.dim(2)), out.data<float>(), stream_);
  return out;
}

}  // namespace sparvar::cuda
