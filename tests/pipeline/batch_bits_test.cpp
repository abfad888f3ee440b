// The bits of a batch against those that each of its pictures draws alone, on the device under test
// (SPARVAR_TEST_DEVICE).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "backend/device_under_test.h"
#include "pipeline/session.h"
#include "support.h"
#include "weights/safetensors.h"

namespace sparvar {
namespace {

constexpr double kMargin = 1e-3;  // of two logits: nearer ones may fall either way

/// What a walk drew at each scale.
struct Drawn {
  std::vector<Tensor> logits, bits;  // f32 [B, n, 2 * bits], U8 [B, n, bits]
  Tensor codes;
};

/// Rows of one tensor after those of the other.
Tensor joined(const std::vector<Tensor>& parts) {
  Shape shape = parts.front().shape();
  shape[0] = static_cast<std::int64_t>(parts.size());
  Tensor out = Tensor::empty(parts.front().dtype(), shape);
  std::byte* to = out.data<std::byte>();
  for (const Tensor& part : parts) to = std::copy_n(part.data<std::byte>(), part.bytes(), to);
  return out;
}

/// The bundled model in f32 on its first seven scales, with made-up texts.
class BatchBits : public ::testing::Test {
 protected:
  static constexpr int kScales = 7;
  static constexpr int kTexts = 8;
  static constexpr int kLengths[kTexts] = {9, 1, 30, 5, 64, 17, 3, 41};

  static std::string bundled() { return testing::models_dir() + "/emoji"; }
  static std::unique_ptr<Backend> device() {
    if (!testing::on_gpu()) return make_cpu_backend({.compute = DType::f32, .threads = 2});
    return testing::make_gpu({.compute = DType::f32});
  }
  static ModelConfig short_config() {
    ModelConfig config = read_model_config(bundled() + "/config.json");
    config.schedule.resize(kScales);
    return config;
  }

  StateShape shape(int pictures) const {
    return {.pictures = pictures,
            .guided = true,
            .schedule = config_.schedule,
            .rope_grid = config_.rope_grid,
            .plan = {},
            .text_tokens = 64 * pictures,
            .longest_text = 64};
  }
  PackedText texts(int first, int count) const {
    PackedText out;
    std::vector<float> values;
    for (int i = first; i < first + count; ++i) {
      const Tensor one = testing::random_tensor({kLengths[i], config_.transformer.text_channels}, 100 + i);
      values.insert(values.end(), one.data<float>(), one.data<float>() + one.size());
      out.offsets.push_back(out.offsets.back() + kLengths[i]);
    }
    out.states = Tensor::from(values, {out.offsets.back(), config_.transformer.text_channels});
    return out;
  }
  static WalkInputs inputs() {
    WalkInputs out;
    out.cfg.assign(kScales, 3.0F);
    out.tau.assign(kScales, 0.8F);
    out.sampling.greedy = true;
    return out;
  }
  /// Operation by operation; with the bits of `forced`, where there are any, in place of those that are drawn.
  Drawn watched(int first, int count, const std::vector<Tensor>& forced = {}) {
    Drawn out;
    WalkWatch watch;
    watch.observe = [&](const std::string& name, const Tensor& value) {
      if (name.starts_with("logits_cfg.")) out.logits.push_back(backend_->download(value));
      if (name.starts_with("bits.")) out.bits.push_back(value);
    };
    if (!forced.empty()) watch.forced_bits = [&](int k) { return forced[k]; };
    Walk walk(transformer_, *backend_, shape(count));
    out.codes = backend_->download(walk.run(texts(first, count), inputs(), watch));
    return out;
  }

  std::unique_ptr<Backend> backend_ = device();
  ModelConfig config_ = short_config();
  TensorFile transformer_file_ = TensorFile::open_in(bundled(), "transformer");
  TensorFile vae_file_ = TensorFile::open_in(bundled(), "vae");
  Infinity transformer_{config_.transformer, transformer_file_, *backend_};
  BsqVae vae_{config_.vae, vae_file_, *backend_};
};

/// Bits of picture `i` of the batch that are other ones than it draws alone; `largest`: of their margins.
int turned_bits(const Drawn& together, int i, const Drawn& alone, double& largest) {
  int turned = 0;
  for (std::size_t k = 0; k < alone.bits.size(); ++k) {
    const Tensor bits = together.bits[k].rows(i, i + 1);
    const Tensor logits = together.logits[k].rows(i, i + 1);
    for (std::int64_t j = 0; j < bits.size(); ++j) {
      if (bits.data<std::uint8_t>()[j] == alone.bits[k].data<std::uint8_t>()[j]) continue;
      ++turned;
      for (const Tensor& of : {logits, alone.logits[k]})
        largest =
            std::max(largest, std::abs(static_cast<double>(of.data<float>()[2 * j + 1]) - of.data<float>()[2 * j]));
    }
  }
  return turned;
}

/// Teacher forcing keeps batch and single pictures together, so every bit of every scale can be compared. A picture
/// none of whose bits turned must then be drawn the same to the last bit without forcing, as recorded programs draw it.
TEST_F(BatchBits, ABatchDrawsTheBitsOfEachPicture) {
  std::vector<Drawn> alone;
  const int most = testing::on_gpu() ? kTexts : 2;  // a third of a second each on a CPU; Walk's own test has more there
  alone.reserve(most);
  for (int i = 0; i < most; ++i) alone.push_back(watched(i, 1));
  for (int batch = most; batch > 0; batch /= 2) {
    std::vector<Tensor> forced;
    for (int k = 0; k < kScales; ++k) {
      std::vector<Tensor> parts;
      parts.reserve(batch);
      for (int i = 0; i < batch; ++i) parts.push_back(alone[i].bits[k]);
      forced.push_back(joined(parts));
    }
    const Drawn together = watched(0, batch, forced);
    ASSERT_EQ(together.bits.size(), static_cast<std::size_t>(kScales));
    backend_->reserve([&] { Session(transformer_, vae_, *backend_, shape(batch)).run_programs(); });
    Session session(transformer_, vae_, *backend_, shape(batch));
    const Tensor codes = backend_->download(session.walk().run(texts(0, batch), inputs()));
    for (int i = 0; i < batch; ++i) {
      SCOPED_TRACE(::testing::Message() << "picture " << i << " of " << batch);
      double largest = 0;
      const int turned = turned_bits(together, i, alone[i], largest);
      EXPECT_LE(largest, kMargin) << turned << " bits differ";
      if (turned > 0) continue;
      EXPECT_EQ(testing::max_difference(codes.rows(i, i + 1), alone[i].codes), 0);
    }
  }
}

/// The comparison above sees bits that a picture does not share with another.
TEST_F(BatchBits, AnotherTextDrawsOtherBits) {
  const Drawn one = watched(0, 1);
  double largest = 0;
  EXPECT_GT(turned_bits(watched(1, 1), 0, one, largest), 0);
  EXPECT_GT(largest, kMargin);
}

}  // namespace
}  // namespace sparvar
