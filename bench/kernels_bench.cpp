// Google Benchmark of the attention kernels: one tile of 64 queries of one head, by instruction set, type and head dim.
//   kernels_bench --benchmark_filter='bf16.*/64'
#include <benchmark/benchmark.h>

#include <string>

#include "backend/backend.h"
#include "backend/cpu/attention/kernels.h"

namespace {

using namespace sparvar;

constexpr int kQueries = 64;
constexpr int kKeys = 4096;

/// `run`: consecutive keys; every run is followed by a gap of its own length.
void attend(benchmark::State& state, const char* instruction_set, DType type, int run) {
  if (!select_attention_kernels(instruction_set)) {
    state.SkipWithError("not on this machine");
    return;
  }
  const auto dim = state.range(0);
  const auto backend = make_cpu_backend({.compute = type, .threads = 1});
  AttentionArgs args{.q = Tensor::zeros(type, {1, 1, kQueries, dim}),
                     .k = Tensor::zeros(type, {1, 1, 2 * kKeys, dim}),
                     .v = Tensor::zeros(type, {1, 1, 2 * kKeys, dim}),
                     .out = Tensor::zeros(type, {1, kQueries, 1, dim}),
                     .scale = 1.0F,
                     .statistics = {}};
  const QueryTiles tiles = row_tiles(kQueries, kQueries);
  KeyLists lists;
  lists.tiles = 1;
  for (int key = 0; key < 2 * kKeys; key += 2 * run) lists.runs.push_back({key, run});
  lists.offset.push_back(static_cast<std::int64_t>(lists.runs.size()));
  for (auto _ : state)  // NOLINT(clang-analyzer-deadcode.DeadStores): this is how it loops
    backend->attention(args, tiles, lists);
  state.counters["GFLOP/s"] = benchmark::Counter(4e-9 * kQueries * kKeys * static_cast<double>(dim),
                                                 benchmark::Counter::kIsIterationInvariantRate);
  select_attention_kernels("");
}

}  // namespace

int main(int argc, char** argv) {
  for (const char* set : {"generic", "avx2", "avx512", "avx512-bf16"})
    for (const DType type : {DType::f32, DType::bf16})
      for (const int run : {kKeys, 8, 1}) {
        const std::string name =
            std::string(set) + "/" + (type == DType::f32 ? "f32" : "bf16") + "/runs_of_" + std::to_string(run);
        auto* bench =
            benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) { attend(state, set, type, run); });
        for (const int dim : {64, 80, 96, 112, 128}) bench->Arg(dim);
        bench->Unit(benchmark::kMicrosecond);
      }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
}
