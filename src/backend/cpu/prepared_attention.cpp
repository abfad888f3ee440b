// sparvar/attention.h: the CPU kernels on foreign buffers.
#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <variant>
#include <vector>

#include "attention/csla.h"
#include "attention/key_lists.h"
#include "attention/plan_text.h"
#include "backend/cpu/attention/kernels.h"
#include "backend/cpu/attention/pieces.h"
#include "core/held_signals.h"
#include "sparvar/attention.h"

namespace sparvar {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr int kDenseTile = 64;
constexpr int kMaxScales = 64;
constexpr int kMaxSide = 4096;               // of a grid: keys are counted in 32 bits
constexpr std::int64_t kMaxHeads = 1 << 20;  // batch * heads

[[noreturn]] void refuse(const std::string& what) { throw Error(ErrorKind::usage, "attention: " + what); }

void check_range(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value < low || value > high) refuse(fmt::format("{} is {}; allowed: {} to {}", name, value, low, high));
}

void check(const ScaleSchedule& schedule, int scale, int layer) {
  check_range("number of scales", static_cast<std::int64_t>(schedule.size()), 1, kMaxScales);
  check_range("scale", scale, 0, static_cast<std::int64_t>(schedule.size()) - 1);
  check_range("layer", layer, 0, 4096);
  std::int64_t tokens = 0;
  for (const Grid& grid : schedule) {
    check_range("height of a grid", grid.h, 1, kMaxSide);
    check_range("width of a grid", grid.w, 1, kMaxSide);
    tokens += static_cast<std::int64_t>(grid.h) * grid.w;
  }
  check_range("number of tokens", tokens, 1, 1 << 30);
}

void check(const AttentionShape& shape) {
  check_range("batch", shape.batch, 1, kMaxHeads);
  check_range("heads", shape.heads, 1, kMaxHeads / shape.batch);
  check_range("head_dim", shape.head_dim, 1, kMaxHeadDim);
  check_range("threads", shape.threads, 0, 1024);
  if (!std::isfinite(shape.scale))
    refuse(fmt::format("scale of the logits is {}; allowed: finite numbers", shape.scale));
}

/// Output rows are written by several threads: no two may share an element.
void check(const AttentionBuffers& buffers, const AttentionShape& shape, int queries) {
  if (buffers.q == nullptr || buffers.k == nullptr || buffers.v == nullptr || buffers.out == nullptr)
    refuse("q, k, v or out is null");
  // From the smallest stride up, each must clear what lies within it.
  struct Axis {
    std::int64_t stride;
    std::int64_t count;
  };
  const AttentionStrides& out = buffers.out_strides;
  Axis axes[] = {{std::abs(out.row), queries}, {std::abs(out.head), shape.heads}, {std::abs(out.batch), shape.batch}};
  std::sort(std::begin(axes), std::end(axes), [](const Axis& a, const Axis& b) { return a.stride < b.stride; });
  std::int64_t extent = shape.head_dim;
  for (const Axis& axis : axes) {
    if (axis.count == 1) continue;
    if (axis.stride < extent)
      refuse(fmt::format("rows of out overlap: strides batch {}, head {}, row {} for {} channels", out.batch, out.head,
                         out.row, shape.head_dim));
    extent += axis.stride * (axis.count - 1);
  }
}

const char* name_of(const AttentionMethod& method) {
  return std::holds_alternative<Cs4aAttention>(method) ? "cs4a" : "probe";
}

}  // namespace

struct PreparedAttention::Impl {
  AttentionShape shape;
  QueryTiles tiles;
  KeyLists lists;
  std::vector<Piece> pieces;
  int keys = 0;
  double share = 1;
  std::vector<std::byte> workspace;

  std::int64_t jobs() const {
    return static_cast<std::int64_t>(shape.batch) * shape.heads * static_cast<std::int64_t>(pieces.size());
  }
  std::size_t workspace_bytes() const {
    return static_cast<std::size_t>(shape.threads) * kAttentionScratchBytes + kAlignment;
  }
  AttendTask task(const AttentionBuffers& buffers, std::int64_t job) const;
  void take(const AttentionShape& shape);
  void finish();
  void run(const AttentionBuffers& buffers, std::byte* scratch) const;
};

AttendTask PreparedAttention::Impl::task(const AttentionBuffers& buffers, std::int64_t job) const {
  const auto count = static_cast<std::int64_t>(pieces.size());
  const Piece& piece = pieces[job % count];
  const std::int64_t b = job / count / shape.heads;
  const std::int64_t h = job / count % shape.heads;
  const std::int64_t element = shape.precision == Precision::f32 ? 4 : 2;
  const auto offset = [&](const AttentionStrides& s) { return (b * s.batch + h * s.head) * element; };
  const auto at = [&](const void* data, const AttentionStrides& s) {
    return static_cast<const std::byte*>(data) + offset(s);
  };
  return {.q = at(buffers.q, buffers.q_strides),
          .q_stride = buffers.q_strides.row,
          .rows = tiles.rows.data() + piece.first,
          .row_count = piece.count,
          .k = at(buffers.k, buffers.k_strides),
          .k_stride = buffers.k_strides.row,
          .v = at(buffers.v, buffers.v_strides),
          .v_stride = buffers.v_strides.row,
          .runs = lists.runs.data() + lists.offset[piece.tile],
          .run_count = lists.offset[piece.tile + 1] - lists.offset[piece.tile],
          .head_dim = shape.head_dim,
          .scale = shape.scale,
          .out = static_cast<std::byte*>(buffers.out) + offset(buffers.out_strides),
          .out_stride = buffers.out_strides.row,
          .statistics = nullptr};
}

void PreparedAttention::Impl::run(const AttentionBuffers& buffers, std::byte* scratch) const {
  check(buffers, shape, static_cast<int>(tiles.rows.size()));
  const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(scratch) % kAlignment;
  if (misaligned != 0) scratch += kAlignment - misaligned;
  const AttentionKernels& kernels = attention_kernels();
  const auto attend = shape.precision == Precision::f32 ? kernels.attend_f32 : kernels.attend_bf16;
  const std::int64_t all = jobs();
  const HeldSignals held;
#pragma omp parallel for schedule(dynamic, 1) num_threads(shape.threads) if (shape.threads > 1)
  for (std::int64_t job = 0; job < all; ++job)
    attend(task(buffers, job), scratch + static_cast<std::size_t>(omp_get_thread_num()) * kAttentionScratchBytes);
}

void PreparedAttention::Impl::take(const AttentionShape& wanted) {
  check(wanted);
  shape = wanted;
  if (shape.threads == 0) shape.threads = omp_get_num_procs();
  if (shape.scale == 0.0F) shape.scale = 1.0F / std::sqrt(static_cast<float>(shape.head_dim));
}

/// What follows from tiles, lists and keys.
void PreparedAttention::Impl::finish() {
  share = sparvar::share_of_pairs(tiles, lists, keys);
  pieces = pieces_of(tiles);
  workspace.resize(workspace_bytes());
  // OpenMP makes its threads at their first use: here, so that run() does not.
  const HeldSignals held;
#pragma omp parallel num_threads(shape.threads)
  {}
}

PreparedAttention::PreparedAttention(const QueryTiles& tiles, const KeyLists& lists, int keys,
                                     const AttentionShape& shape)
    : impl_(std::make_unique<Impl>()) {
  impl_->take(shape);
  require_sound(tiles, lists);
  if (lists.lists != 1) refuse(fmt::format("{} lists a tile: one, for all heads, is taken here", lists.lists));
  std::vector<char> seen(tiles.rows.size());
  for (const std::int32_t row : tiles.rows) {
    if (row >= static_cast<std::int32_t>(seen.size()) || seen[row] != 0)
      refuse(fmt::format("tiles of {} queries: query {} is {}", seen.size(), row,
                         row < static_cast<std::int32_t>(seen.size()) ? "there twice" : "not one of them"));
    seen[row] = 1;
  }
  for (const KeyRun& run : lists.runs)
    if (run.begin + run.count > keys) refuse(fmt::format("a list reads key {} of {}", run.begin + run.count - 1, keys));
  impl_->keys = keys;
  impl_->tiles = tiles;
  impl_->lists = lists;
  impl_->finish();
}

PreparedAttention::PreparedAttention(const AttentionPlan& plan, const ScaleSchedule& schedule, int scale, int layer,
                                     const AttentionShape& shape)
    : impl_(std::make_unique<Impl>()) {
  check(schedule, scale, layer);
  impl_->take(shape);
  plan.validate();
  if (plan.pruning)
    refuse(fmt::format("plan {} prunes tokens: which ones run depends on the picture", printable(plan.name)));
  impl_->keys = first_keys(schedule, scale).back();

  const AttentionMethod& method = plan.method(layer, scale);
  if (const auto* csla = std::get_if<CslaAttention>(&method)) {
    impl_->tiles = csla_tiles(schedule[scale], *csla);
    impl_->lists = csla_lists(schedule, scale, *csla, impl_->tiles);
  } else if (std::holds_alternative<DenseAttention>(method)) {
    impl_->tiles = row_tiles(schedule[scale].tokens(), kDenseTile);
    impl_->lists = all_keys(impl_->tiles, impl_->keys);
  } else {
    refuse(fmt::format("plan {}: {} at layer {}, scale {} chooses its keys while it runs; here only dense and csla run",
                       printable(plan.name), name_of(method), layer, scale));
  }
  impl_->finish();
}

PreparedAttention::PreparedAttention(PreparedAttention&&) noexcept = default;
PreparedAttention& PreparedAttention::operator=(PreparedAttention&&) noexcept = default;
PreparedAttention::~PreparedAttention() = default;

int PreparedAttention::queries() const { return static_cast<int>(impl_->tiles.rows.size()); }
int PreparedAttention::keys() const { return impl_->keys; }
double PreparedAttention::share_of_pairs() const { return impl_->share; }
std::size_t PreparedAttention::workspace_bytes() const { return impl_->workspace_bytes(); }

void PreparedAttention::run(const AttentionBuffers& buffers) { impl_->run(buffers, impl_->workspace.data()); }

void PreparedAttention::run(const AttentionBuffers& buffers, std::span<std::byte> workspace) const {
  if (workspace.size() < workspace_bytes())
    refuse(fmt::format("a workspace of {} bytes; needed: {}", workspace.size(), workspace_bytes()));
  impl_->run(buffers, workspace.data());
}

}  // namespace sparvar
