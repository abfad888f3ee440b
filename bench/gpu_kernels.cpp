// gpu_kernels: convolutions and dense attention of the released models, own kernels beside cuDNN's, with the share of
// the rate of a large matrix product of the same run. gpu_kernels [convolutions] [attention] [lists] [plans] [norms]
// [fp8]; none: all; chosen: of lists, only those with keys of their own; profile: each plan once, for a profiler;
// older: plans beside themselves with kernels that newer ones replaced; products: by any algorithm of the library's.
// One JSON object on standard output.
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "attention/cs4a.h"
#include "attention/csla.h"
#include "backend/backend.h"
#include "backend/cuda/check.h"
#include "backend/cuda/cublaslt.h"
#include "backend/cuda/cudnn.h"
#include "backend/cuda/gemm.h"
#include "backend/cuda/kernels/kernels.h"
#include "core/resolutions.h"
#include "models/attention_runner.h"
#include "pipeline/measure_attention.h"

namespace sparvar::cuda {
namespace {

/// Device memory with random bf16 (or f32) numbers.
class Buffer {
 public:
  Buffer(std::int64_t count, DType type, float deviation, cudaStream_t stream) {
    check(cudaMalloc(&memory_, std::max<std::int64_t>(count, 1) * static_cast<std::int64_t>(size_of(type))), "memory");
    static std::uint64_t seed = 0;
    fill_random(memory_, type, count, ++seed, deviation, stream);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { (void)cudaFree(memory_); }
  void* get() const { return memory_; }

 private:
  void* memory_ = nullptr;
};

/// Median seconds of a call, `repeat` samples of some 5 ms after 20 ms of calls: the clock rises meanwhile.
double seconds_of(cudaStream_t stream, const std::function<void()>& call, int repeat = 9) {
  cudaEvent_t start = nullptr, stop = nullptr;
  check(cudaEventCreate(&start), "an event");
  check(cudaEventCreate(&stop), "an event");
  const auto sample = [&](int calls) {
    check(cudaEventRecord(start, stream), "timing");
    for (int i = 0; i < calls; ++i) call();
    check(cudaEventRecord(stop, stream), "timing");
    check(cudaEventSynchronize(stop), "timing");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start, stop), "timing");
    return static_cast<double>(milliseconds) * 1e-3 / calls;
  };
  (void)sample(2);
  (void)sample(std::clamp(static_cast<int>(20e-3 / sample(2)), 1, 2000));
  const int calls = std::clamp(static_cast<int>(5e-3 / sample(2)), 1, 200);
  std::vector<double> samples;
  samples.reserve(repeat);
  for (int i = 0; i < repeat; ++i) samples.push_back(sample(calls));
  std::sort(samples.begin(), samples.end());
  (void)cudaEventDestroy(start);
  (void)cudaEventDestroy(stop);
  return samples[samples.size() / 2];
}

double product_seconds(cudaStream_t stream, std::int64_t side) {
  std::string why;
  const std::unique_ptr<CublasLt> library = CublasLt::load(why);
  if (!library) throw Error(ErrorKind::system, why);
  Gemms gemms(*library, stream);
  const Buffer x(side * side, DType::bf16, 1.0F, stream);
  const Buffer w(side * side, DType::bf16, 0.01F, stream);
  const Buffer y(side * side, DType::bf16, 0.0F, stream);
  const Buffer workspace(Gemms::kWorkspaceBytes / 2, DType::bf16, 0.0F, stream);
  const GemmShape shape{.rows = side, .in = side, .out = side};
  return seconds_of(stream, [&] {
    gemms.run(shape, {x.get(), nullptr}, {w.get(), nullptr}, nullptr, y.get(), workspace.get());
  });
}

struct Layer {
  int side, in, out, kernel;
  bool residual, enlarged;
};

/// Of the decoder of the 1024 x 1024 models (128 channels, mult 1, 2, 4, 4 (, 4)) and of the bundled model.
const std::vector<Layer> kLayers = {
    {64, 512, 512, 3, true, false},    {128, 512, 512, 3, true, false},  {128, 512, 512, 3, false, true},
    {256, 512, 512, 3, true, false},   {256, 512, 512, 3, false, true},  {512, 512, 256, 3, false, false},
    {512, 256, 256, 3, true, false},   {512, 256, 256, 3, false, true},  {1024, 256, 128, 3, false, false},
    {1024, 256, 128, 1, false, false}, {1024, 128, 128, 3, true, false}, {1024, 128, 3, 3, false, false},
    {64, 128, 128, 3, true, false},    {512, 32, 32, 3, true, false}};

nlohmann::ordered_json measure(const Layer& layer, Cudnn* library, double rate, cudaStream_t stream) {
  const int side = layer.enlarged ? 2 * layer.side : layer.side;
  const std::int64_t pixels = std::int64_t{side} * side;
  const Buffer x(std::int64_t{layer.side} * layer.side * layer.in, DType::bf16, 1.0F, stream);
  const Buffer large(layer.enlarged ? pixels * layer.in : 0, DType::bf16, 1.0F, stream);
  const Buffer w(std::int64_t{layer.out} * layer.kernel * layer.kernel * layer.in, DType::bf16, 0.02F, stream);
  const Buffer bias(layer.out, DType::f32, 1.0F, stream);
  const Buffer residual(pixels * layer.out, DType::bf16, 1.0F, stream);
  const Buffer y(pixels * layer.out, DType::bf16, 0.0F, stream);
  const int pad = layer.kernel / 2;
  const double flops = 2.0 * static_cast<double>(pixels) * layer.out * layer.kernel * layer.kernel * layer.in;
  const OwnConvolution own{.x = x.get(),
                           .w = w.get(),
                           .bias = static_cast<const float*>(bias.get()),
                           .residual = layer.residual ? residual.get() : nullptr,
                           .y = y.get(),
                           .type = DType::bf16,
                           .batch = 1,
                           .height = layer.side,
                           .width = layer.side,
                           .in = layer.in,
                           .out = layer.out,
                           .kernel = layer.kernel,
                           .stride = 1,
                           .pad_begin = pad,
                           .pad_end = pad,
                           .enlarged = layer.enlarged};
  nlohmann::ordered_json row = {
      {"layer", fmt::format("{}x{}{} {} -> {}, {}x{}{}", layer.side, layer.side, layer.enlarged ? " enlarged" : "",
                            layer.in, layer.out, layer.kernel, layer.kernel, layer.residual ? " + residual" : "")}};
  const double seconds = seconds_of(stream, [&] { convolution(own, stream); });
  row["own_us"] = seconds * 1e6;
  row["own_tflops"] = flops / seconds * 1e-12;
  row["own_share"] = flops / seconds / rate;
  if (library == nullptr) return row;
  const Cudnn::ConvolutionShape shape{.batch = 1,
                                      .height = side,
                                      .width = side,
                                      .in = layer.in,
                                      .out = layer.out,
                                      .kernel = layer.kernel,
                                      .stride = 1,
                                      .pad_begin = pad,
                                      .pad_end = pad,
                                      .residual = layer.residual};
  const Buffer scratch(library->convolution_workspace(shape), DType::bf16, 0.0F, stream);
  const double other = seconds_of(stream, [&] {
    if (layer.enlarged)
      upsample_nearest_2x(x.get(), DType::bf16, 1, layer.side, layer.side, layer.in, large.get(), stream);
    library->convolution(shape, layer.enlarged ? large.get() : x.get(), w.get(), static_cast<const float*>(bias.get()),
                         residual.get(), y.get(), scratch.get());
  });
  row["cudnn_us"] = other * 1e6;
  row["cudnn_tflops"] = flops / other * 1e-12;
  row["cudnn_over_own"] = other / seconds;
  return row;
}

struct Heads {
  int batch, heads, dim, queries, keys;
};
const std::vector<Heads> kHeads = {{2, 28, 128, 144, 265},   {2, 28, 128, 256, 521},    {2, 28, 128, 400, 921},
                                   {2, 28, 128, 576, 1497},  {2, 28, 128, 1024, 2521},  {2, 28, 128, 1600, 4121},
                                   {2, 28, 128, 2304, 6425}, {2, 28, 128, 4096, 10521}, {2, 16, 128, 256, 521},
                                   {2, 16, 128, 576, 1497},  {2, 16, 128, 1024, 2521},  {2, 16, 128, 1600, 4121},
                                   {2, 16, 128, 2304, 6425}, {2, 16, 128, 4096, 10521}, {2, 12, 64, 1600, 4121},
                                   {2, 12, 64, 4096, 10521}, {2, 8, 96, 4096, 10521}};

constexpr int kSamples = 9;

/// `tile`: queries that take all keys together, as a list; 0: as the device does it.
double dense_us(const Heads& h, Backend& device, int tile = 0) {
  AttentionArgs args{.q = device.random(DType::bf16, {h.batch, h.heads, h.queries, h.dim}, 1, 1.0F),
                     .k = device.random(DType::bf16, {h.batch, h.heads, h.keys, h.dim}, 2, 1.0F),
                     .v = device.random(DType::bf16, {h.batch, h.heads, h.keys, h.dim}, 3, 1.0F),
                     .out = device.empty(DType::bf16, {h.batch, h.queries, h.heads, h.dim}),
                     .scale = 0.1F,
                     .statistics = {}};
  AttentionListsPtr lists;
  if (tile > 0) {
    const QueryTiles tiles = row_tiles(h.queries, tile);
    lists = device.prepare_lists(tiles, all_keys(tiles, h.keys));
  }
  constexpr int kCalls = 8;
  const auto body = [&] {
    for (int i = 0; i < kCalls; ++i) lists ? device.attention(args, *lists) : device.dense_attention(args, h.keys);
  };
  device.reserve(body);
  const ProgramPtr program = device.program(body);
  return warm_seconds(
             device, [&] { program->run(); }, kSamples) /
         kCalls * 1e6;
}

/// As the engine does it, in tiles of so many queries, and as cuDNN does.
nlohmann::ordered_json measure(const Heads& h, double rate, Backend& backend, Backend& other) {
  const double flops = 4.0 * h.batch * h.heads * static_cast<double>(h.queries) * h.keys * h.dim;
  nlohmann::ordered_json row = {
      {"attention", fmt::format("{}x{} heads of {}, {} x {}", h.batch, h.heads, h.dim, h.queries, h.keys)}};
  const double own = dense_us(h, backend), cudnn = dense_us(h, other);
  row["own_us"] = own;
  row["own_tflops"] = flops / own * 1e-6;
  row["own_share"] = flops / own * 1e6 / rate;
  for (const int tile : {64, 128, 192}) row[fmt::format("tiles_of_{}_us", tile)] = dense_us(h, backend, tile);
  row["cudnn_us"] = cudnn;
  row["cudnn_tflops"] = flops / cudnn * 1e-6;
  row["cudnn_over_own"] = cudnn / own;
  return row;
}

/// Tiles of queries, their lists, and what they are called.
struct Lists {
  std::string name;
  int scale = 12;
  QueryTiles tiles;
  KeyLists lists;
};

Lists csla_case(int scale, bool blocks) {
  const ScaleSchedule schedule = *schedule_1m(1.0);
  const AttentionPlan plan =
      AttentionPlan::preset(blocks ? "csla-blocks" : "csla", 1, static_cast<int>(schedule.size()));
  const auto& method = std::get<CslaAttention>(plan.method(0, scale));
  QueryTiles tiles = csla_tiles(schedule[scale], method);
  KeyLists lists = csla_lists(schedule, scale, method, tiles);
  return {plan.name, scale, std::move(tiles), std::move(lists)};
}

/// As many keys for every tile, drawn for each head: what plans that choose keys give.
Lists chosen_case(const std::string& name, const QueryGroup& group, int keys, int heads) {
  const ScaleSchedule schedule = *schedule_1m(1.0);
  const int last = static_cast<int>(schedule.size()) - 1;
  const int all = first_keys(schedule, last).back();
  QueryTiles tiles = group_tiles(schedule[last], group);
  KeyLists lists = sparvar::build_lists(2 * heads, tiles.count(), all, [&](int list, int tile, KeySet& set) {
    std::minstd_rand random(static_cast<unsigned>(list * 1000 + tile + 1));
    int left = keys;
    for (int key = 0; key < all && left > 0; ++key)
      if (static_cast<int>(random() % static_cast<unsigned>(all - key)) < left) set.add(key, 1), --left;
  });
  return {name, last, std::move(tiles), std::move(lists)};
}

/// The kernel for Hopper beside that for sm_80 and dense attention, at one of the last scales of a square picture.
nlohmann::ordered_json measure(const Lists& c, int heads, Backend& backend, Backend& older) {
  const ScaleSchedule schedule = *schedule_1m(1.0);
  const std::int64_t keys = first_keys(schedule, c.scale).back();
  const std::int64_t queries = schedule[c.scale].tokens();
  constexpr int kDim = 128;
  const auto seconds = [&](Backend& device, bool sparse) {
    const AttentionListsPtr prepared = device.prepare_lists(c.tiles, c.lists);
    AttentionArgs args{.q = device.random(DType::bf16, {2, heads, queries, kDim}, 1, 1.0F),
                       .k = device.random(DType::bf16, {2, heads, keys, kDim}, 2, 1.0F),
                       .v = device.random(DType::bf16, {2, heads, keys, kDim}, 3, 1.0F),
                       .out = device.random(DType::bf16, {2, queries, heads, kDim}, 4, 1.0F),
                       .scale = 0.1F,
                       .statistics = {}};
    return warm_seconds(
        device,
        [&] { sparse ? device.attention(args, *prepared) : device.dense_attention(args, static_cast<int>(keys)); },
        kSamples);
  };
  const double share = share_of_pairs(c.tiles, c.lists, static_cast<int>(keys));
  const double sparse = seconds(backend, true);
  const double dense = seconds(backend, false);
  return {{"lists", fmt::format("{} 2x{} heads of {}, {} x {}", c.name, heads, kDim, queries, keys)},
          {"share_of_pairs", share},
          {"own_us", sparse * 1e6},
          {"own_tflops", 4.0 * 2 * heads * static_cast<double>(queries * keys) * kDim * share / sparse * 1e-12},
          {"sm80_us", seconds(older, true) * 1e6},
          {"dense_us", dense * 1e6},
          {"dense_over_own", dense / sparse}};
}

/// What a layer gives to attention at one scale, and where its output goes.
AttentionArgs args_of_layer(Backend& backend, int heads, int dim, std::int64_t queries, std::int64_t keys) {
  return {.q = backend.random(DType::bf16, {2, heads, queries, dim}, 1, 0.3F),
          .k = backend.random(DType::bf16, {2, heads, keys, dim}, 2, 1.0F),
          .v = backend.random(DType::bf16, {2, heads, keys, dim}, 3, 1.0F),
          .out = backend.empty(DType::bf16, {2, queries, heads, dim}),
          .scale = 1.0F,
          .statistics = {}};
}

/// What CS4A does at the scale where it decides: dense attention with statistics, column sums, choice of keys.
nlohmann::ordered_json measure_decision(const char* name, int heads, Backend& backend) {
  const ScaleSchedule schedule = *schedule_1m(1.0);
  const AttentionPlan plan = AttentionPlan::preset(name, 1, static_cast<int>(schedule.size()));
  const auto& method = std::get<Cs4aAttention>(plan.method(0, static_cast<int>(schedule.size()) - 1));
  const std::int64_t keys = first_keys(schedule, method.decision_scale).back();
  const std::int64_t queries = schedule[method.decision_scale].tokens();
  const QueryTiles groups = group_tiles(schedule[method.decision_scale], method.group);
  constexpr int kDim = 128;
  AttentionArgs args = args_of_layer(backend, heads, kDim, queries, keys);
  args.statistics = backend.empty(DType::f32, {2, heads, queries, 2});
  const std::vector<int> counts = counts_to_choose(method, schedule);
  Tensor choice = backend.empty(DType::i32, {2L * heads, groups.count(), std::int64_t{counts.front()}});
  const double all = warm_seconds(
      backend, [&] { backend.attend_and_choose(args, {}, groups, static_cast<int>(keys), counts, choice); }, kSamples);
  const double dense = warm_seconds(
      backend, [&] { backend.dense_attention(args, static_cast<int>(keys)); }, kSamples);
  const double sums = warm_seconds(
      backend, [&] { (void)backend.column_sums(args, groups, static_cast<int>(keys)); }, kSamples);
  return {{"decision", fmt::format("{} 2x{} heads of {}, {} x {}", name, heads, kDim, queries, keys)},
          {"groups", groups.count()},
          {"own_us", all * 1e6},
          {"dense_us", dense * 1e6},
          {"column_sums_us", sums * 1e6}};
}

/// A whole plan at one layer, everything between q, k, v and the output, as the transformer calls it.
/// `once`: each scale once and nothing timed, for a profiler.
void measure_plan(const std::string& name, int heads, bool once, Backend& backend, nlohmann::ordered_json& report,
                  const std::string& kernels = "") {
  const ScaleSchedule schedule = *schedule_1m(1.0);
  const int scales = static_cast<int>(schedule.size());
  AttentionRunner runner(backend, AttentionPlan::preset(name, 1, scales), schedule, 1);
  constexpr int kDim = 128;
  for (int scale = scales - 3; scale < scales; ++scale) {
    const std::int64_t keys = first_keys(schedule, scale).back();
    const std::int64_t queries = schedule[scale].tokens();
    AttentionArgs args = args_of_layer(backend, heads, kDim, queries, keys);
    const auto call = [&] {
      runner.start(scale);
      runner.run(0, scale, args);
    };
    if (once) {
      call();
      continue;
    }
    const double seconds = warm_seconds(backend, call, kSamples);
    const double dense = warm_seconds(
        backend, [&] { backend.dense_attention(args, static_cast<int>(keys)); }, kSamples);
    report["plans"].push_back(
        {{"plan", fmt::format("{}{} 2x{} heads of {}, {} x {}", name, kernels, heads, kDim, queries, keys)},
         {"share_of_pairs", runner.share_of_pairs(scale)},
         {"own_us", seconds * 1e6},
         {"dense_us", dense * 1e6},
         {"dense_over_own", dense / seconds}});
  }
}

/// Microseconds of a linear layer in the middle of a recorded program that reads other weights every time.
double layer_us(Backend& backend, LinearKind kind, std::int64_t rows, std::int64_t in, std::int64_t out) {
  std::vector<LinearPtr> layers;
  for (std::uint64_t i = 0; i < 8; ++i)
    layers.push_back(backend.prepare_linear(backend.random(DType::bf16, {out, in}, i + 1, 0.02F),
                                            backend.random(DType::bf16, {out}, i + 9, 1.0F), kind));
  NormArgs norm;
  norm.out = layers.front()->input;
  const Tensor x = backend.layer_norm(backend.random(DType::f32, {rows, in}, 20, 1.0F), norm);
  const auto body = [&] {
    for (const LinearPtr& layer : layers) (void)backend.linear(x, *layer, Activation::none, DType::bf16);
  };
  backend.reserve(body);
  const ProgramPtr program = backend.program(body);
  std::vector<double> seconds;
  for (int i = 0; i < 12; ++i) {
    const MarkPtr start = backend.mark();
    program->run();
    if (const double time = backend.mark()->seconds_since(*start); i > 1) seconds.push_back(time);
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2] / static_cast<double>(layers.size()) * 1e6;
}

nlohmann::ordered_json measure_layer(Backend& backend, std::int64_t rows, std::int64_t in, std::int64_t out) {
  const double bf16_us = layer_us(backend, LinearKind::plain, rows, in, out);
  const double fp8_us = layer_us(backend, LinearKind::narrow, rows, in, out);
  const auto numbers = static_cast<double>(in * out);
  const double flops = 2.0 * static_cast<double>(rows) * numbers;
  return {{"layer", fmt::format("{} x {} -> {}", rows, in, out)},
          {"bf16_us", bf16_us},
          {"fp8_us", fp8_us},
          {"bf16_tflops", flops / bf16_us * 1e-6},
          {"fp8_tflops", flops / fp8_us * 1e-6},
          {"bf16_weights_gb_s", 2 * numbers / bf16_us * 1e-3},
          {"fp8_weights_gb_s", numbers / fp8_us * 1e-3}};
}

/// Rows to e4m3, with GELU: bytes that must move over the time.
nlohmann::ordered_json measure_quantise(std::int64_t rows, int width, bool gelu, cudaStream_t stream) {
  const Buffer x(rows * width, DType::bf16, 1.0F, stream);
  const Buffer out(rows * width, DType::bf16, 0.0F, stream);
  const Buffer scales(rows, DType::f32, 0.0F, stream);
  const QuantiseRows args{.x = x.get(),
                          .type = DType::bf16,
                          .rows = rows,
                          .width = width,
                          .gelu = gelu,
                          .out = out.get(),
                          .scales = static_cast<float*>(scales.get())};
  const double seconds = seconds_of(stream, [&] { quantise_rows(args, stream); });
  return {{"quantise", fmt::format("{} x {}{}", rows, width, gelu ? ", GELU" : "")},
          {"own_us", seconds * 1e6},
          {"own_gb_s", static_cast<double>(rows) * width * 3 / seconds * 1e-9}};
}

/// Residual, gate and norm in one: bytes that must move over the time.
nlohmann::ordered_json measure_norm(std::int64_t rows, int width, cudaStream_t stream) {
  const Buffer x(rows * width, DType::f32, 1.0F, stream);
  const Buffer y(rows * width, DType::bf16, 1.0F, stream);
  const Buffer parts(6L * width, DType::f32, 1.0F, stream);
  const Buffer out(rows * width, DType::bf16, 1.0F, stream);
  const auto* part = static_cast<const float*>(parts.get());
  const RowNorm norm{.rows = rows,
                     .width = width,
                     .period = rows / 2,
                     .scale = part,
                     .shift = part + 2L * width,
                     .scale_offset = 1.0F,
                     .eps = 1e-6F,
                     .centred = true};
  const double seconds = seconds_of(stream, [&] {
    add_gated_normalise(norm, static_cast<float*>(x.get()), y.get(), DType::bf16, part + 4L * width, rows / 2,
                        out.get(), DType::bf16, stream);
  });
  return {{"norm", fmt::format("{} x {}", rows, width)},
          {"own_us", seconds * 1e6},
          {"own_gb_s", static_cast<double>(rows) * width * 12 / seconds * 1e-9}};
}

/// The linear layers of Infinity-8B.
const std::vector<std::pair<std::int64_t, std::int64_t>> kLayerSizes = {
    {3584, 10752}, {3584, 3584}, {3584, 14336}, {14336, 3584}};

/// Choices of this process alone.
class Remembered final : public ProductChoices {
 public:
  std::optional<Choice> find(const std::string&, const std::string&) const override { return std::nullopt; }
  Choice keep(const std::string&, const std::string&, const Choice& choice) override { return choice; }
};

void measure_fp8(Backend& backend, cudaStream_t stream, nlohmann::ordered_json& report) {
  for (const std::int64_t rows : {2, 32, 72, 128, 288, 1152, 8192})
    for (const auto& [in, out] : kLayerSizes) report["fp8"].push_back(measure_layer(backend, rows, in, out));
  for (const std::int64_t rows : {2, 288, 8192}) {
    report["quantise"].push_back(measure_quantise(rows, 3584, false, stream));
    report["quantise"].push_back(measure_quantise(rows, 14336, true, stream));
  }
}

void run(const std::set<std::string>& sections) {
  const auto wanted = [&](const char* name) { return sections.empty() || sections.contains(name); };
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
  constexpr std::int64_t kSide = 8192;
  const double rate = 2.0 * kSide * kSide * kSide / product_seconds(stream, kSide);
  std::string why;
  const std::unique_ptr<Cudnn> library = Cudnn::load(stream, why);
  nlohmann::ordered_json report = {{"product_tflops", rate * 1e-12}, {"cudnn", library ? library->version() : why}};
  if (wanted("convolutions"))
    for (const Layer& layer : kLayers) report["convolutions"].push_back(measure(layer, library.get(), rate, stream));
  const auto device = [&](bool hopper, const CudaOptions::Older& older = {}) {
    return make_cuda_backend(
        {.compute = DType::bf16, .device = 0, .fp8 = false, .planning = false, .hopper = hopper, .older = older}, why);
  };
  if (wanted("attention")) {
    const std::unique_ptr<Backend> backend = device(true), other = device(true, {.dense = true});
    if (!backend || !other) throw Error(ErrorKind::system, why);
    for (const Heads& heads : kHeads) report["attention"].push_back(measure(heads, rate, *backend, *other));
  }
  if (wanted("lists") || sections.contains("chosen")) {
    const std::unique_ptr<Backend> backend = device(true), older = device(false);
    if (!backend || !older) throw Error(ErrorKind::system, why);
    const auto add = [&](const Lists& lists, int heads) {
      report["lists"].push_back(measure(lists, heads, *backend, *older));
    };
    if (wanted("lists"))
      for (const int heads : {28, 16})
        for (const int scale : {10, 11, 12})
          for (const bool blocks : {false, true}) add(csla_case(scale, blocks), heads);
    add(chosen_case("192 rows, 2128 keys", {.tile_h = 0, .tile_w = 0, .rows = 192}, 2128, 28), 28);
    add(chosen_case("8x16, 2128 keys", {.tile_h = 8, .tile_w = 16, .rows = 0}, 2128, 28), 28);
    add(chosen_case("8x8, 950 keys", {.tile_h = 8, .tile_w = 8, .rows = 0}, 950, 28), 28);
    for (const char* name : {"cs4a-rows", "cs4a"}) report["decisions"].push_back(measure_decision(name, 28, *backend));
  }
  const bool profile = sections.contains("profile");
  if (profile || wanted("plans")) {
    const std::unique_ptr<Backend> backend = device(true);
    if (!backend) throw Error(ErrorKind::system, why);
    for (const char* name : {"csla", "csla-blocks", "cs4a-rows", "cs4a", "probe", "sparvar"})
      measure_plan(name, 28, profile, *backend, report);
  }
  // Plans with a kernel that a newer one replaced: only where they are asked for.
  if (sections.contains("older")) {
    const std::vector<std::tuple<const char*, const char*, CudaOptions::Older>> cases = {
        {"probe", "", {}},
        {"probe", ", choice by column sums", {.choice = true}},
        {"probe", ", lists key by key", {.lists = true}},
        {"probe", ", residual in two steps", {.residual = true}},
        {"probe", ", keys gathered", {.boxes = true}},
        {"csla-blocks", "", {}},
        {"csla-blocks", ", keys gathered", {.boxes = true}},
        {"cs4a", "", {}},
        {"cs4a", ", residual by itself", {.epilogue = true}},
        {"cs4a-rows", "", {}}};
    for (const auto& [name, kernels, older] : cases) {
      const std::unique_ptr<Backend> backend = device(true, older);
      if (!backend) throw Error(ErrorKind::system, why);
      measure_plan(name, 28, profile, *backend, report, kernels);
    }
  }
  // Products by any algorithm beside those with the bits of the library's favourite.
  if (sections.contains("products")) {
    const std::unique_ptr<Backend> backend = device(true);
    if (!backend) throw Error(ErrorKind::system, why);
    const std::unique_ptr<Backend> chooses =
        make_cuda_backend({.compute = DType::bf16, .device = 0, .choices = std::make_shared<Remembered>()}, why);
    if (!chooses) throw Error(ErrorKind::system, why);
    for (const std::int64_t rows : {288, 512, 800, 1152})
      for (const auto& [in, out] : kLayerSizes)
        report["products"].push_back({{"layer", fmt::format("{} x {} -> {}", rows, in, out)},
                                      {"any_bits_us", layer_us(*chooses, LinearKind::plain, rows, in, out)},
                                      {"favourite_bits_us", layer_us(*backend, LinearKind::plain, rows, in, out)}});
  }
  if (wanted("norms"))
    for (const std::int64_t rows : {2, 72, 288, 512, 800, 1152, 2048, 4608, 8192})
      report["norms"].push_back(measure_norm(rows, 3584, stream));
  if (wanted("fp8")) {
    const std::unique_ptr<Backend> backend =
        make_cuda_backend({.compute = DType::bf16, .device = 0, .fp8 = true, .planning = false, .hopper = true}, why);
    if (backend)
      measure_fp8(*backend, stream, report);
    else
      report["no_fp8"] = why;
  }
  fmt::print("{}\n", report.dump(1));
}

}  // namespace
}  // namespace sparvar::cuda

int main(int argc, char** argv) {
  try {
    sparvar::cuda::run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    fmt::print(stderr, "gpu_kernels: {}\n", error.what());
    return 1;
  }
}
