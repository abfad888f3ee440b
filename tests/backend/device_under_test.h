// The device that the tests of this room run on: SPARVAR_TEST_DEVICE (cpu; cuda; cuda-sm80: without the kernels that
// only Hopper can run). Tensors of a test stay on the host.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "sparvar/error.h"

namespace sparvar::testing {

inline bool on_gpu() {
  const char* name = std::getenv("SPARVAR_TEST_DEVICE");
  return name != nullptr && std::string(name).starts_with("cuda");
}

inline bool without_hopper() {
  const char* name = std::getenv("SPARVAR_TEST_DEVICE");
  return name != nullptr && std::string(name) == "cuda-sm80";
}

/// A backend whose operations take and give host tensors: everything is uploaded before and downloaded after.
class HostSide final : public Backend {
 public:
  explicit HostSide(std::unique_ptr<Backend> device) : device_(std::move(device)) {}
  Backend& device() { return *device_; }

  DType compute_type() const override { return device_->compute_type(); }
  std::string describe() const override { return device_->describe(); }
  bool records() const override { return device_->records(); }
  ProgramPtr program(std::function<void()> body) override { return device_->program(std::move(body)); }
  MarkPtr mark() override { return device_->mark(); }
  void reserve(const std::function<void()>& bodies) override { device_->reserve(bodies); }
  MemoryUse memory_use() const override { return device_->memory_use(); }
  int recordings() const override { return device_->recordings(); }
  std::vector<ProductTime> product_times() const override { return device_->product_times(); }
  int length_step() const override { return device_->length_step(); }
  DType product_type() const override { return device_->product_type(); }

  Tensor empty(DType dtype, Shape shape) override { return down(device_->empty(dtype, std::move(shape))); }
  Tensor zeros(DType dtype, Shape shape) override { return down(device_->zeros(dtype, std::move(shape))); }
  Tensor random(DType dtype, Shape shape, std::uint64_t seed, float deviation) override {
    return down(device_->random(dtype, std::move(shape), seed, deviation));
  }
  Tensor upload(const Tensor& host) override { return down(up(host)); }
  Tensor download(const Tensor& tensor) override { return tensor; }
  void write(Tensor& to, const Tensor& from) override {
    change(to, [&](Tensor& t) { device_->write(t, from); });
  }
  void fill_zero(Tensor& x) override {
    change(x, [&](Tensor& t) { device_->fill_zero(t); });
  }
  Tensor clone(const Tensor& x) override { return down(device_->clone(up(x))); }
  Tensor repeat(const Tensor& x, int times) override { return down(device_->repeat(up(x), times)); }
  Tensor grown(const Tensor& x, std::int64_t more) override { return down(device_->grown(up(x), more)); }

  LinearPtr prepare_linear(const Tensor& weight, const Tensor& bias, LinearKind kind) override {
    return device_->prepare_linear(weight, bias, kind);
  }
  ConvolutionPtr prepare_convolution(const Tensor& weight, const Tensor& bias, int stride, int begin,
                                     int end) override {
    return device_->prepare_convolution(weight, bias, stride, begin, end);
  }
  Tensor linear(const Tensor& x, const Linear& weights, Activation activation, DType out) override {
    return down(device_->linear(up(x), weights, activation, out));
  }
  void add_gated(Tensor& residual, const Tensor& y, const Tensor& gate) override {
    change(residual, [&](Tensor& r) { device_->add_gated(r, up(y), up(gate)); });
  }
  Tensor layer_norm(const Tensor& x, const NormArgs& args) override {
    return down(device_->layer_norm(up(x), up(args)));
  }
  Tensor add_gated_norm(Tensor& residual, const Tensor& y, const Tensor& gate, const NormArgs& args) override {
    Tensor out;
    change(residual, [&](Tensor& r) { out = down(device_->add_gated_norm(r, up(y), up(gate), up(args))); });
    return out;
  }
  Tensor rms_norm(const Tensor& x, const Tensor& weight, float eps, DType out) override {
    return down(device_->rms_norm(up(x), up(weight), eps, out));
  }
  Tensor apply(const Tensor& x, Activation activation) override { return down(device_->apply(up(x), activation)); }
  void add_repeated(Tensor& x, const Tensor& y) override {
    change(x, [&](Tensor& t) { device_->add_repeated(t, up(y)); });
  }
  Tensor modulation(const Tensor& shared, const Tensor& own, int parts) override {
    return down(device_->modulation(up(shared), up(own), parts));
  }
  void guide_hidden(Tensor& x, const Tensor& guidance) override {
    change(x, [&](Tensor& t) { device_->guide_hidden(t, up(guidance)); });
  }
  Tensor guide_logits(const Tensor& logits, std::int64_t pictures, const Tensor& guidance) override {
    return down(device_->guide_logits(up(logits), pictures, up(guidance)));
  }
  Tensor sample_bits(const Tensor& logits, const Tensor& sampling, int scale) override {
    return down(device_->sample_bits(up(logits), up(sampling), scale));
  }
  void add_codes(Tensor& summed, const Tensor& bits, Grid tokens, bool patchify) override {
    change(summed, [&](Tensor& s) { device_->add_codes(s, up(bits), tokens, patchify); });
  }
  Tensor codes_to_words(const Tensor& summed, Grid tokens, bool patchify) override {
    return down(device_->codes_to_words(up(summed), tokens, patchify));
  }

  void split_qkv(const Tensor& qkv, const QkvArgs& args, Tensor& q, Tensor& k, Tensor& v) override {
    QkvArgs there = args;
    there.head_scale = up(args.head_scale);
    there.rope = up(args.rope);
    Tensor dq = up(q), dk = up(k), dv = up(v);
    device_->split_qkv(up(qkv), there, dq, dk, dv);
    q = down(dq), k = down(dk), v = down(dv);
  }
  void dense_attention(AttentionArgs& args, int keys) override {
    change(args, [&](AttentionArgs& a) { device_->dense_attention(a, keys); });
  }
  void attention(AttentionArgs& args, const QueryTiles& tiles, const KeyLists& lists) override {
    change(args, [&](AttentionArgs& a) { device_->attention(a, tiles, lists); });
  }
  AttentionListsPtr prepare_lists(const QueryTiles& tiles, const KeyLists& lists) override {
    return device_->prepare_lists(tiles, lists);
  }
  void attention(AttentionArgs& args, const AttentionLists& lists) override {
    change(args, [&](AttentionArgs& a) { device_->attention(a, lists); });
  }
  Tensor column_sums(const AttentionArgs& args, const QueryTiles& groups, int keys) override {
    return down(device_->column_sums(up(args), groups, keys));
  }
  void add_resized(Tensor& out, const Tensor& cache, const TokenMap& from, const TokenMap& to) override {
    change(out, [&](Tensor& o) { device_->add_resized(o, up(cache), from, to); });
  }
  Tensor gather_rows(const Tensor& x, const std::vector<std::int32_t>& rows) override {
    return down(device_->gather_rows(up(x), rows));
  }
  Tensor gather_queries(const Tensor& x, const std::vector<std::int32_t>& rows) override {
    return down(device_->gather_queries(up(x), rows));
  }
  void subtract(const Tensor& a, const Tensor& b, Tensor& out) override {
    change(out, [&](Tensor& o) { device_->subtract(up(a), up(b), o); });
  }
  void select_keys(const Tensor& sums, const std::vector<int>& counts, Tensor& choice) override {
    change(choice, [&](Tensor& c) { device_->select_keys(up(sums), counts, c); });
  }
  void attend_and_choose(AttentionArgs& args, const std::vector<std::int32_t>& rows, const QueryTiles& groups, int keys,
                         const std::vector<int>& counts, Tensor& choice) override {
    change(choice, [&](Tensor& c) {
      change(args, [&](AttentionArgs& a) { device_->attend_and_choose(a, rows, groups, keys, counts, c); });
    });
  }
  Tensor minus_rows(const Tensor& x, const Tensor& of, const std::vector<std::int32_t>& rows) override {
    return down(device_->minus_rows(up(x), up(of), rows));
  }
  AttentionRecipePtr prepare_recipe(const ListRecipe& recipe) override { return device_->prepare_recipe(recipe); }
  void attention(AttentionArgs& args, const AttentionRecipe& recipe, const Tensor& choice, Tensor& pairs) override {
    Tensor counted = up(pairs);
    change(args, [&](AttentionArgs& a) { device_->attention(a, recipe, up(choice), counted); });
    if (pairs.defined()) pairs = down(counted);
  }
  void attention_with_residual(AttentionArgs& args, const AttentionRecipe& recipe, const Tensor& choice, Tensor& pairs,
                               const Tensor& cache, const TokenMap& from, const TokenMap& to) override {
    Tensor counted = up(pairs);
    change(args, [&](AttentionArgs& a) {
      device_->attention_with_residual(a, recipe, up(choice), counted, up(cache), from, to);
    });
    if (pairs.defined()) pairs = down(counted);
  }
  Tensor cross_attention(const Tensor& q, const Tensor& kv, const Tensor& lengths, std::int64_t longest, float scale,
                         bool settled) override {
    return down(device_->cross_attention(up(q), up(kv), up(lengths), longest, scale, settled));
  }
  Tensor biased_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                          const Tensor& length) override {
    return down(device_->biased_attention(up(q), up(k), up(v), up(bias), up(length)));
  }
  Tensor gated_gelu(const Tensor& a, const Tensor& b) override { return down(device_->gated_gelu(up(a), up(b))); }

  Tensor convolution(const Tensor& x, const Convolution& weights, const Tensor& residual) override {
    return down(device_->convolution(up(x), weights, up(residual)));
  }
  Tensor upsample_nearest_2x(const Tensor& x) override { return down(device_->upsample_nearest_2x(up(x))); }
  Tensor upsampled_convolution(const Tensor& x, const Convolution& weights) override {
    return down(device_->upsampled_convolution(up(x), weights));
  }
  Tensor group_norm(const Tensor& x, int groups, const Tensor& weight, const Tensor& bias, float eps,
                    bool silu) override {
    return down(device_->group_norm(up(x), groups, up(weight), up(bias), eps, silu));
  }
  Tensor to_nhwc(const Tensor& x) override { return down(device_->to_nhwc(up(x))); }
  Tensor to_nchw(const Tensor& x, float limit) override { return down(device_->to_nchw(up(x), limit)); }
  Tensor to_bytes(const Tensor& x) override { return down(device_->to_bytes(up(x))); }

 private:
  Tensor up(const Tensor& host) { return device_->upload(host); }
  NormArgs up(NormArgs args) {
    args.scale = up(args.scale);
    args.shift = up(args.shift);
    return args;
  }
  AttentionArgs up(const AttentionArgs& a) {
    return {
        .q = up(a.q), .k = up(a.k), .v = up(a.v), .out = up(a.out), .scale = a.scale, .statistics = up(a.statistics)};
  }
  Tensor down(const Tensor& there) { return device_->download(there); }
  template <typename Change>
  void change(Tensor& host, Change body) {
    Tensor there = up(host);
    body(there);
    host = down(there);
  }
  template <typename Change>
  void change(AttentionArgs& host, Change body) {
    AttentionArgs there = up(host);
    body(there);
    host.out = down(there.out);
    if (host.statistics.defined()) host.statistics = down(there.statistics);
  }
  std::unique_ptr<Backend> device_;
};

/// A GPU itself, whose tensors are its own. Throws where it is not there.
inline std::unique_ptr<Backend> make_gpu(const CudaOptions& options = {}) {
  std::string why;
  auto device = make_cuda_backend(options, why);
  if (!device) throw Error(ErrorKind::system, why);
  return device;
}

/// Of the device under test. Throws where it is a GPU that is not there.
inline std::unique_ptr<Backend> make_backend(DType compute, int threads = 2) {
  if (!on_gpu()) return make_cpu_backend({.compute = compute, .threads = threads});
  return std::make_unique<HostSide>(make_gpu({.compute = compute, .hopper = !without_hopper()}));
}

}  // namespace sparvar::testing
