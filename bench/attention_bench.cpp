// Times attention at one geometry: dense and every sparse form, against the machine's own matrix-product rate.
// attention_bench [--batch 2] [--heads 4] [--dim 128] [--scale 12] [--dtype bf16] [--threads 2] [--repeat 5] [--json]
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "attention/csla.h"
#include "backend/backend.h"
#include "core/clock.h"
#include "core/resolutions.h"

namespace {

using namespace sparvar;

struct Options {
  int batch = 2, heads = 4, dim = 128, scale = 12, threads = 0, repeat = 5;
  DType type = DType::bf16;
  bool json = false;
};

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--json") {
      o.json = true;
      continue;
    }
    if (i + 1 == argc) throw std::runtime_error("no value for " + name);
    const std::string value = argv[++i];
    if (name == "--batch")
      o.batch = std::stoi(value);
    else if (name == "--heads")
      o.heads = std::stoi(value);
    else if (name == "--dim")
      o.dim = std::stoi(value);
    else if (name == "--scale")
      o.scale = std::stoi(value);
    else if (name == "--threads")
      o.threads = std::stoi(value);
    else if (name == "--repeat")
      o.repeat = std::stoi(value);
    else if (name == "--dtype")
      o.type = value == "f32" ? DType::f32 : DType::bf16;
    else
      throw std::runtime_error("unknown option " + name);
  }
  return o;
}

double median_seconds(int repeat, const std::function<void()>& work) {
  work();
  std::vector<double> seconds;
  for (int r = 0; r < repeat; ++r) {
    const auto start = sparvar::Clock::now();
    work();
    seconds.push_back(sparvar::seconds_since(start));
  }
  std::nth_element(seconds.begin(), seconds.begin() + repeat / 2, seconds.end());
  return seconds[repeat / 2];
}

Tensor random(Shape shape, DType type, float scale) {
  std::mt19937 generator(std::random_device{}());
  std::normal_distribution<float> normal(0.0F, scale);
  Tensor x = Tensor::empty(DType::f32, std::move(shape));
  for (std::int64_t i = 0; i < x.size(); ++i) x.data<float>()[i] = normal(generator);
  return x.to(type);
}

/// GFLOP/s of a 2048^3 product: the ceiling every row is compared with.
double gemm_rate(Backend& backend, DType type, int repeat) {
  constexpr std::int64_t n = 2048;
  const Tensor x = random({n, n}, type, 1);
  const LinearPtr w = backend.prepare_linear(random({n, n}, type, 1), {});
  const double seconds = median_seconds(repeat, [&] { backend.linear(x, *w, Activation::none, type); });
  return 2.0 * n * n * n / seconds / 1e9;
}

int run(const Options& o) {
  const ScaleSchedule& schedule = *schedule_1m(1.0);
  int keys = 0;
  for (int k = 0; k <= o.scale; ++k) keys += schedule[k].tokens();
  const int n = schedule[o.scale].tokens();
  const auto backend = make_cpu_backend({.compute = o.type, .threads = o.threads});
  AttentionArgs args{.q = random({o.batch, o.heads, n, o.dim}, o.type, 1.0F),
                     .k = random({o.batch, o.heads, keys, o.dim}, o.type, 0.1F),
                     .v = random({o.batch, o.heads, keys, o.dim}, o.type, 1.0F),
                     .out = Tensor::empty(o.type, {o.batch, n, o.heads, o.dim}),
                     .scale = 1.0F,
                     .statistics = {}};
  const double ceiling = gemm_rate(*backend, o.type, o.repeat);

  nlohmann::json rows = nlohmann::json::array();
  const auto add = [&](const std::string& name, const QueryTiles& tiles, const KeyLists& lists) {
    const double seconds = median_seconds(o.repeat, [&] { backend->attention(args, tiles, lists); });
    const double share = share_of_pairs(tiles, lists, keys);
    const double rate = 4.0 * o.batch * o.heads * o.dim * share * n * keys / seconds / 1e9;
    rows.push_back(
        {{"name", name}, {"ms", seconds * 1e3}, {"share", share}, {"gflops", rate}, {"share_of_gemm", rate / ceiling}});
  };
  const QueryTiles dense = row_tiles(n, 64);
  add("dense", dense, all_keys(dense, keys));
  CslaAttention csla;
  const QueryTiles tiles = csla_tiles(schedule[o.scale], csla);
  add("csla lists", tiles, csla_lists(schedule, o.scale, csla, tiles));
  csla.form = CslaAttention::Form::blocks;
  const QueryTiles blocks = csla_tiles(schedule[o.scale], csla);
  add("csla blocks", blocks, csla_lists(schedule, o.scale, csla, blocks));

  if (o.json) {
    fmt::print("{}\n", nlohmann::json({{"backend", backend->describe()},
                                       {"dtype", name_of(o.type)},
                                       {"batch", o.batch},
                                       {"heads", o.heads},
                                       {"dim", o.dim},
                                       {"queries", n},
                                       {"keys", keys},
                                       {"gemm_gflops", ceiling},
                                       {"rows", rows}})
                           .dump());
    return 0;
  }
  fmt::print("{}; {} B={} H={} D={} {}x{}; GEMM {:.0f} GFLOP/s\n", backend->describe(), name_of(o.type), o.batch,
             o.heads, o.dim, n, keys, ceiling);
  for (const auto& row : rows)
    fmt::print("{:12} {:8.1f} ms  {:5.1f} % of pairs  {:6.0f} GFLOP/s  {:3.0f} % of GEMM\n",
               row["name"].get<std::string>(), row["ms"].get<double>(), 100 * row["share"].get<double>(),
               row["gflops"].get<double>(), 100 * row["share_of_gemm"].get<double>());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "attention_bench: %s\n", error.what());
    return 1;
  }
}
