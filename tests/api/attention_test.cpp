// The public attention kernel on foreign buffers, against double precision: odd sizes, odd strides, every instruction
// set; and that a run allocates nothing.
#include "sparvar/attention.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <new>
#include <random>
#include <thread>

#include "attention/csla.h"
#include "backend/cpu/attention/kernels.h"
#include "core/tensor.h"

// ThreadSanitizer has its own operators.
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SPARVAR_FOREIGN_NEW
#endif
#endif

#ifndef SPARVAR_FOREIGN_NEW
namespace {
std::atomic<long> allocations{0};

void* counted(std::size_t bytes, std::size_t alignment = 0) {
  ++allocations;
  const std::size_t rounded = alignment == 0 ? bytes : (bytes + alignment - 1) / alignment * alignment;
  void* block = alignment == 0 ? std::malloc(bytes == 0 ? 1 : bytes) : std::aligned_alloc(alignment, rounded);
  if (block == nullptr) throw std::bad_alloc();
  return block;
}
}  // namespace

// Every other form of new and delete ends in these.
// gcc inlines one of the pair and then misses the other.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
void* operator new(std::size_t bytes) { return counted(bytes); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return counted(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* block) noexcept { std::free(block); }
void operator delete(void* block, std::size_t) noexcept { std::free(block); }
void operator delete(void* block, std::align_val_t) noexcept { std::free(block); }
void operator delete(void* block, std::size_t, std::align_val_t) noexcept { std::free(block); }
#endif

namespace sparvar {
namespace {

const ScaleSchedule kSchedule = {{1, 1}, {2, 3}, {3, 5}, {5, 8}, {7, 11}};
constexpr int kLast = 4;

AttentionPlan csla_plan(CslaAttention::Form form = CslaAttention::Form::lists) {
  CslaAttention csla;
  csla.windows = {-1, -1, 1, 3, 5};
  csla.sink_scales = 2;
  csla.group = {3, 4, 0};
  csla.form = form;
  csla.block = 16;
  return {"windows", {{.first_scale = 2, .method = csla}}};
}

/// One of q, k, v, out: bytes with room around every row, so that a wrong stride is seen.
class Buffer {
 public:
  AttentionStrides strides;

  Buffer(Precision precision, int batch, int heads, int rows, int dim, const AttentionStrides& layout, unsigned seed)
      : strides(layout), precision_(precision) {
    const std::int64_t elements =
        (batch - 1) * layout.batch + (heads - 1) * layout.head + (rows - 1) * layout.row + dim;
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal(0.0F, 1.2F);
    for (std::int64_t i = 0; i < elements; ++i) {
      f32_.push_back(normal(generator));
      bf16_.push_back(to_bfloat16(f32_.back()).bits);
    }
  }
  void* data() { return precision_ == Precision::f32 ? static_cast<void*>(f32_.data()) : bf16_.data(); }
  double at(int b, int h, int row, int d) const {
    const std::int64_t i = b * strides.batch + h * strides.head + row * strides.row + d;
    return precision_ == Precision::f32 ? f32_[i] : to_float(BFloat16{bf16_[i]});
  }
  std::vector<float> all() const {
    std::vector<float> values = f32_;
    if (precision_ == Precision::bf16)
      for (std::size_t i = 0; i < values.size(); ++i) values[i] = to_float(BFloat16{bf16_[i]});
    return values;
  }

 private:
  Precision precision_;
  std::vector<float> f32_;
  std::vector<std::uint16_t> bf16_;
};

struct Case {
  const char* isa;
  Precision precision;
  int batch, heads, dim, gap;  // gap: elements between rows that belong to nobody
  bool head_major;             // [b][h][row][d], else [b][row][h][d]
  bool shared_keys;            // one k and v for all heads
  int plan;                    // 0 dense, 1 lists, 2 blocks
};

std::string name_case(const ::testing::TestParamInfo<Case>& info) {
  const Case& c = info.param;
  std::string isa = c.isa;
  std::replace(isa.begin(), isa.end(), '-', '_');
  return isa + (c.precision == Precision::f32 ? "_f32" : "_bf16") + "_d" + std::to_string(c.dim) + "_gap" +
         std::to_string(c.gap) + (c.head_major ? "_heads" : "_rows") + (c.shared_keys ? "_shared" : "") + "_plan" +
         std::to_string(c.plan);
}

AttentionStrides strides_of(const Case& c, int rows, bool shared) {
  const std::int64_t step = c.dim + c.gap;
  const int heads = shared ? 1 : c.heads;
  AttentionStrides strides;
  strides.row = c.head_major ? step : step * heads;
  strides.head = c.head_major ? step * rows : step;
  strides.batch = step * rows * heads + c.gap;
  if (shared) strides.head = 0;
  return strides;
}

AttentionPlan plan_of(int number) {
  if (number == 0) return {};
  return csla_plan(number == 1 ? CslaAttention::Form::lists : CslaAttention::Form::blocks);
}

/// Keys that the plan shows to each query, from the lists' own builder, which is tested against masks elsewhere.
std::vector<std::vector<int>> visible_keys(const AttentionPlan& plan, int queries, int keys) {
  std::vector<std::vector<int>> visible(queries);
  const auto* csla = std::get_if<CslaAttention>(&plan.method(0, kLast));
  const QueryTiles tiles = csla != nullptr ? csla_tiles(kSchedule[kLast], *csla) : row_tiles(queries, queries);
  const KeyLists lists = csla != nullptr ? csla_lists(kSchedule, kLast, *csla, tiles) : all_keys(tiles, keys);
  for (int t = 0; t < tiles.count(); ++t)
    for (int i = tiles.offset[t]; i < tiles.offset[t + 1]; ++i)
      for (std::int64_t r = lists.offset[t]; r < lists.offset[t + 1]; ++r)
        for (int key = 0; key < lists.runs[r].count; ++key) visible[tiles.rows[i]].push_back(lists.runs[r].begin + key);
  return visible;
}

std::vector<double> reference(const Buffer& q, const Buffer& k, const Buffer& v, int b, int h, int row,
                              const std::vector<int>& keys, int dim, double scale) {
  std::vector<double> logits;
  double largest = -INFINITY;
  for (const int key : keys) {
    double dot = 0;
    for (int d = 0; d < dim; ++d) dot += q.at(b, h, row, d) * k.at(b, h, key, d);
    logits.push_back(dot * scale);
    largest = std::max(largest, logits.back());
  }
  double total = 0;
  for (double& x : logits) total += x = std::exp(x - largest);
  std::vector<double> out(dim, 0.0);
  for (std::size_t i = 0; i < keys.size(); ++i)
    for (int d = 0; d < dim; ++d) out[d] += logits[i] / total * v.at(b, h, keys[i], d);
  return out;
}

class PublicAttention : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (!select_attention_kernels(GetParam().isa)) GTEST_SKIP() << "this machine has no " << GetParam().isa;
  }
  void TearDown() override { select_attention_kernels(""); }
};

TEST_P(PublicAttention, MatchesDoublePrecisionAndTouchesNothingElse) {
  const Case c = GetParam();
  const AttentionPlan plan = plan_of(c.plan);
  PreparedAttention attention(
      plan, kSchedule, kLast, 0,
      {.batch = c.batch, .heads = c.heads, .head_dim = c.dim, .precision = c.precision, .threads = 2});
  const int queries = attention.queries();
  const int keys = attention.keys();
  ASSERT_EQ(queries, 77);
  ASSERT_EQ(keys, 1 + 6 + 15 + 40 + 77);
  const auto make = [&](int rows, bool shared, unsigned seed) {
    return Buffer(c.precision, c.batch, shared ? 1 : c.heads, rows, c.dim, strides_of(c, rows, shared), seed);
  };
  Buffer q = make(queries, false, 1), k = make(keys, c.shared_keys, 2), v = make(keys, c.shared_keys, 3);
  Buffer out = make(queries, false, 4);
  const std::vector<float> before = out.all();
  attention.run({q.data(), k.data(), v.data(), out.data(), q.strides, k.strides, v.strides, out.strides});

  const double tolerance = c.precision == Precision::f32 ? 2e-5 : 3e-2;
  const std::vector<std::vector<int>> visible = visible_keys(plan, queries, keys);
  std::vector<bool> written(before.size(), false);
  double pairs = 0;
  for (const auto& list : visible) pairs += static_cast<double>(list.size());
  EXPECT_NEAR(attention.share_of_pairs(), pairs / queries / keys, 1e-12);
  for (int b = 0; b < c.batch; ++b)
    for (int h = 0; h < c.heads; ++h)
      for (int row = 0; row < queries; ++row) {
        const std::vector<double> expected =
            reference(q, k, v, b, h, row, visible[row], c.dim, 1 / std::sqrt(static_cast<double>(c.dim)));
        for (int d = 0; d < c.dim; ++d) {
          ASSERT_NEAR(out.at(b, h, row, d), expected[d], tolerance) << b << ' ' << h << ' ' << row << ' ' << d;
          written[b * out.strides.batch + h * out.strides.head + row * out.strides.row + d] = true;
        }
      }
  const std::vector<float> after = out.all();
  for (std::size_t i = 0; i < after.size(); ++i)
    ASSERT_TRUE(written[i] || after[i] == before[i]) << "element " << i << " lies between the rows";
}

std::vector<Case> cases() {
  std::vector<Case> out;
  for (const char* isa : {"generic", "avx2", "avx512", "avx512-bf16"})
    for (const Precision precision : {Precision::f32, Precision::bf16}) {
      out.push_back({isa, precision, 2, 3, 33, 5, false, false, 1});
      out.push_back({isa, precision, 1, 2, 64, 0, true, false, 0});
      out.push_back({isa, precision, 2, 2, 20, 3, true, true, 2});
      out.push_back({isa, precision, 1, 1, 1, 1, false, false, 1});
      out.push_back({isa, precision, 3, 1, 130, 7, false, true, 1});
    }
  return out;
}

INSTANTIATE_TEST_SUITE_P(Cases, PublicAttention, ::testing::ValuesIn(cases()), name_case);

#ifndef SPARVAR_FOREIGN_NEW
TEST(PreparedAttention, RunAllocatesNothing) {
  for (const Precision precision : {Precision::f32, Precision::bf16}) {
    PreparedAttention attention(csla_plan(), kSchedule, kLast, 0,
                                {.batch = 2, .heads = 2, .head_dim = 36, .precision = precision, .threads = 2});
    const Case c{"", precision, 2, 2, 36, 1, false, false, 1};
    Buffer q(precision, 2, 2, 77, 36, strides_of(c, 77, false), 1);
    Buffer k(precision, 2, 2, 139, 36, strides_of(c, 139, false), 2);
    Buffer out(precision, 2, 2, 77, 36, strides_of(c, 77, false), 3);
    std::vector<std::byte> workspace(attention.workspace_bytes());
    const AttentionBuffers buffers{q.data(),  k.data(),  k.data(),  out.data(),
                                   q.strides, k.strides, k.strides, out.strides};
    const long before = allocations.load();
    attention.run(buffers);
    attention.run(buffers, workspace);
    EXPECT_EQ(allocations.load(), before);
  }
  const long before = allocations.load();
  delete new int(1);
  EXPECT_EQ(allocations.load(), before + 1) << "the counter counts";
}
#endif

TEST(PreparedAttention, SeveralThreadsWithTheirOwnWorkspace) {
  const PreparedAttention attention(csla_plan(), kSchedule, kLast, 0, {.head_dim = 16, .threads = 1});
  const Case c{"", Precision::f32, 1, 1, 16, 0, false, false, 1};
  Buffer q(Precision::f32, 1, 1, 77, 16, strides_of(c, 77, false), 1);
  Buffer k(Precision::f32, 1, 1, 139, 16, strides_of(c, 139, false), 2);
  std::vector<Buffer> outs(3, Buffer(Precision::f32, 1, 1, 77, 16, strides_of(c, 77, false), 3));
  std::vector<std::thread> threads;
  threads.reserve(outs.size());
  for (Buffer& out : outs)
    threads.emplace_back([&] {
      std::vector<std::byte> workspace(attention.workspace_bytes() + 1);
      for (int i = 0; i < 5; ++i)
        attention.run({q.data(), k.data(), k.data(), out.data(), q.strides, k.strides, k.strides, out.strides},
                      std::span(workspace).subspan(1));
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(outs[0].all(), outs[1].all());
  EXPECT_EQ(outs[0].all(), outs[2].all());
}

TEST(PreparedAttention, ListsOfTheCallersOwn) {
  const Case c{"", Precision::f32, 2, 2, 16, 3, false, false, 1};
  const auto buffer = [&](int rows, unsigned seed) {
    return Buffer(Precision::f32, 2, 2, rows, 16, strides_of(c, rows, false), seed);
  };
  Buffer q = buffer(5, 1), k = buffer(9, 2), v = buffer(9, 3), out = buffer(5, 4);
  const QueryTiles tiles{.offset = {0, 2, 5}, .rows = {4, 0, 1, 3, 2}};
  const KeyLists lists{.lists = 1, .tiles = 2, .offset = {0, 2, 3}, .runs = {{0, 2}, {6, 3}, {4, 1}}};
  PreparedAttention attention(tiles, lists, 9, {.batch = 2, .heads = 2, .head_dim = 16, .scale = 0.5F, .threads = 2});
  EXPECT_EQ(attention.queries(), 5);
  EXPECT_EQ(attention.keys(), 9);
  EXPECT_DOUBLE_EQ(attention.share_of_pairs(), (2 * 5 + 3 * 1) / 45.0);
  attention.run({q.data(), k.data(), v.data(), out.data(), q.strides, k.strides, v.strides, out.strides});
  for (int b = 0; b < 2; ++b)
    for (int h = 0; h < 2; ++h)
      for (const int row : tiles.rows) {
        const std::vector<int> keys = row == 4 || row == 0 ? std::vector<int>{0, 1, 6, 7, 8} : std::vector<int>{4};
        const std::vector<double> expected = reference(q, k, v, b, h, row, keys, 16, 0.5);
        for (int d = 0; d < 16; ++d) EXPECT_NEAR(out.at(b, h, row, d), expected[d], 2e-5) << b << h << row << d;
      }
}

struct Refusal {
  const char* name;
  std::function<void()> call;
  std::vector<std::string> words;
};

void PrintTo(const Refusal& refusal, std::ostream* out) { *out << refusal.name; }

std::vector<Refusal> refusals() {
  const auto prepare = [](const AttentionPlan& plan, const ScaleSchedule& schedule, int scale, AttentionShape shape) {
    return [=] { PreparedAttention(plan, schedule, scale, 0, shape); };
  };
  const auto run = [](bool null, AttentionStrides out, std::size_t workspace) {
    return [=] {
      PreparedAttention attention({}, kSchedule, kLast, 0, {.heads = 2, .head_dim = 8, .threads = 1});
      std::vector<float> x(10000);
      std::vector<std::byte> bytes(workspace == 0 ? attention.workspace_bytes() : workspace);
      const AttentionStrides in{.head = 8, .row = 16};
      attention.run({x.data(), x.data(), null ? nullptr : x.data(), x.data() + 5000, in, in, in, out}, bytes);
    };
  };
  const auto own = [](std::vector<std::int32_t> offset, std::vector<std::int32_t> rows, std::vector<KeyRun> runs) {
    return [=] {
      const auto count = static_cast<std::int64_t>(runs.size());
      PreparedAttention({.offset = offset, .rows = rows}, {.lists = 1, .tiles = 1, .offset = {0, count}, .runs = runs},
                        4, AttentionShape{});
    };
  };
  return {
      {"NoScales", prepare({}, {}, 0, {}), {"number of scales is 0", "1 to 64"}},
      {"ScaleBeyond", prepare({}, kSchedule, 5, {}), {"scale is 5", "0 to 4"}},
      {"ScaleNegative", prepare({}, kSchedule, -1, {}), {"scale is -1"}},
      {"EmptyGrid", prepare({}, {{1, 1}, {0, 4}}, 1, {}), {"height of a grid is 0"}},
      {"HugeGrid", prepare({}, {{1, 1}, {4, 1 << 30}}, 1, {}), {"width of a grid is 1073741824", "1 to 4096"}},
      {"Heads", prepare({}, kSchedule, 1, {.heads = 0}), {"heads is 0"}},
      {"HeadsWrap", prepare({}, kSchedule, 1, {.batch = 1 << 20, .heads = 1 << 20}), {"heads is 1048576"}},
      {"HeadDim", prepare({}, kSchedule, 1, {.head_dim = 257}), {"head_dim is 257", "1 to 256"}},
      {"Threads", prepare({}, kSchedule, 1, {.threads = -1}), {"threads is -1"}},
      {"ScaleOfLogits", prepare({}, kSchedule, 1, {.scale = NAN}), {"scale of the logits is nan"}},
      {"Probe",
       prepare({"mine", {{.first_scale = 2, .method = ProbeAttention{}}}}, kSchedule, kLast, {}),
       {"plan mine", "probe", "layer 0, scale 4", "dense and csla"}},
      {"BadPlan",
       prepare({"mine", {{.first_scale = 2, .method = CslaAttention{.block = 0}}}}, kSchedule, kLast, {}),
       {"mine", "block is 0"}},
      {"ListsBeyondTheKeys", own({0, 2}, {0, 1}, {{3, 2}}), {"reads key 4 of 4"}},
      {"QueryTwice", own({0, 2}, {0, 0}, {{0, 2}}), {"query 0 is there twice"}},
      {"QueryBeyond", own({0, 2}, {0, 2}, {{0, 2}}), {"query 2 is not one of them"}},
      {"Null", run(true, {.head = 8, .row = 16}, 0), {"null"}},
      {"RowsOverlap", run(false, {.head = 8, .row = 15}, 0), {"rows of out overlap", "head 8, row 15", "8 channels"}},
      {"HeadsOverlap", run(false, {.head = 0, .row = 8}, 0), {"rows of out overlap"}},
      {"SmallWorkspace", run(false, {.head = 8, .row = 16}, 100), {"workspace of 100 bytes", "needed"}},
  };
}

class Refused : public ::testing::TestWithParam<Refusal> {};

TEST_P(Refused, WithTheValueAndWhatIsAllowed) {
  try {
    GetParam().call();
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::usage);
    for (const std::string& word : GetParam().words)
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << word << " in: " << error.what();
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, Refused, ::testing::ValuesIn(refusals()),
                         [](const auto& tested) { return std::string(tested.param.name); });

}  // namespace
}  // namespace sparvar
