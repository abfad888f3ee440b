// Algorithms of large products that outlive a process: a second device takes those of the first.
#include <gtest/gtest.h>

#include <cstring>
#include <map>

#include "backend/backend.h"
#include "backend/device_under_test.h"
#include "support.h"

namespace sparvar {
namespace {

class Kept final : public ProductChoices {
 public:
  std::optional<Choice> find(const std::string& machine, const std::string& product) const override {
    const auto found = choices.find(machine + ": " + product);
    return found == choices.end() ? std::nullopt : std::optional(found->second);
  }
  Choice keep(const std::string& machine, const std::string& product, const Choice& choice) override {
    ++kept;
    return choices[machine + ": " + product] = choice;
  }
  std::map<std::string, Choice> choices;
  int kept = 0;
};

TEST(ProductChoices, ASecondDeviceFollowsTheFirst) {
  if (!testing::on_gpu()) GTEST_SKIP() << "a CPU has no choice";
  constexpr std::int64_t kRows = 300, kIn = 2048, kOut = 4096;
  const Tensor x = testing::random_tensor({kRows, kIn}, 1).to(DType::bf16), w = testing::random_tensor({kOut, kIn}, 2),
               bias = testing::random_tensor({kOut}, 3);
  const auto kept = std::make_shared<Kept>();
  const auto product = [&] {
    const auto device = testing::make_gpu({.choices = kept});
    // Two weights: the choice of an algorithm is timed on several.
    const LinearPtr layers[] = {device->prepare_linear(w, bias), device->prepare_linear(w, bias)};
    const Tensor there = device->upload(x);
    Tensor out;
    const auto body = [&] {
      for (const LinearPtr& layer : layers) out = device->linear(there, *layer, Activation::none, DType::bf16);
    };
    device->reserve(body);
    body();
    EXPECT_EQ(device->product_times().size(), 1U);
    return device->download(out);
  };
  const Tensor first = product();
  EXPECT_EQ(kept->kept, 1);
  const auto choices = kept->choices;
  const Tensor second = product();
  EXPECT_EQ(kept->kept, 1);  // found, not measured again
  EXPECT_EQ(0, std::memcmp(first.raw(), second.raw(), first.bytes()));
  for (auto& [name, choice] : kept->choices) choice.algorithm.fill(0);  // of another library: nothing that it offers
  (void)product();
  EXPECT_EQ(kept->kept, 2);
  const Tensor xf = x.to(DType::f32), wf = testing::rounded(w), found = first.to(DType::f32);
  for (std::int64_t r = 0; r < kRows; r += 37)
    for (std::int64_t o = 0; o < kOut; o += 101) {
      double want = bias.data<float>()[o];
      for (std::int64_t i = 0; i < kIn; ++i)
        want += static_cast<double>(xf.data<float>()[r * kIn + i]) * wf.data<float>()[o * kIn + i];
      EXPECT_NEAR(found.data<float>()[r * kOut + o], want, 0.01 * (std::abs(want) + 1)) << r << " " << o;
    }
}

}  // namespace
}  // namespace sparvar
