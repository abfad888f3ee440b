#include "weights/config.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <ostream>

#include "core/resolutions.h"
#include "sparvar/error.h"
#include "support.h"
#include "temp_folder.h"

namespace sparvar {
namespace {

using nlohmann::json;
using testing::TempFolder;

/// The smallest good config: only keys without a default.
json minimal() {
  return json::parse(R"({
    "architecture": "infinity",
    "transformer": {"depth": 4, "embed_dim": 64, "num_heads": 4, "text_channels": 128, "codebook_dim": 16},
    "vae": {"codebook_dim": 16, "ch": 32, "ch_mult": [1, 1, 1, 1, 1]},
    "text_encoder": {"vocab_size": 100, "d_model": 128, "d_ff": 160, "num_layers": 3, "num_heads": 4},
    "scales": [1, 2, 4]
  })");
}

std::string error_of(const std::string& text) {
  try {
    parse_model_config(text, "x/config.json");
  } catch (const Error& failure) {
    EXPECT_EQ(failure.kind(), ErrorKind::input);
    EXPECT_EQ(std::string(failure.what()).find('\n'), std::string::npos) << "one line";
    return failure.what();
  }
  return "accepted";
}

TEST(Config, BundledModel) {
  const ModelConfig config = read_model_config(testing::models_dir() + "/emoji/config.json");
  EXPECT_EQ(config.architecture, "infinity");
  EXPECT_EQ(config.transformer.depth, 8);
  EXPECT_EQ(config.transformer.head_dim(), 64);
  EXPECT_EQ(config.transformer.bits(), 16);
  EXPECT_EQ(config.transformer.ffn_dim(), 1024);
  EXPECT_EQ(config.transformer.block_chunks, 2);
  EXPECT_EQ(config.transformer.text_maxlen, 64);
  EXPECT_EQ(config.vae.ch_mult, (std::vector<int>{1, 2, 4, 8}));
  EXPECT_EQ(config.vae.norm_num_groups, 8);
  EXPECT_EQ(config.text_encoder.vocab_size, 4000);
  EXPECT_EQ(config.text_encoder.d_ff, 512);
  EXPECT_EQ(config.schedule, *schedule_1m(1.0));
  EXPECT_EQ(config.rope_grid, (Grid{64, 64}));
  for (const std::vector<float>& defaults : {config.default_cfg, config.default_tau}) {  // training chooses them
    ASSERT_EQ(defaults.size(), 1U);
    EXPECT_GT(defaults[0], 0.0F);
  }
}

TEST(Config, DefaultsOfKeysThatMayBeMissing) {
  const ModelConfig config = parse_model_config(minimal().dump(), "x/config.json");
  EXPECT_EQ(config.transformer.block_chunks, 1);
  EXPECT_EQ(config.transformer.mlp_ratio, 4.0);
  EXPECT_EQ(config.transformer.text_maxlen, 512);
  EXPECT_FALSE(config.transformer.apply_spatial_patchify);
  EXPECT_EQ(config.transformer.rope2d_normalized_by_hw, 2);
  EXPECT_TRUE(config.transformer.cos_attn);
  EXPECT_TRUE(config.transformer.shared_aln);
  EXPECT_FALSE(config.transformer.nm0);
  EXPECT_EQ(config.transformer.cfg_insertion_layer, std::vector<int>{0});
  EXPECT_EQ(config.vae.patch_size, 16);
  EXPECT_EQ(config.vae.norm_num_groups, 32);
  EXPECT_EQ(config.text_encoder.d_kv, 64);
  EXPECT_EQ(config.text_encoder.relative_attention_max_distance, 128);
  EXPECT_EQ(config.default_cfg, std::vector<float>{3.0F});
  EXPECT_EQ(config.default_tau, std::vector<float>{1.0F});
}

TEST(Config, EveryFormOfAValueThatIsAccepted) {
  json j = minimal();
  j["scales"] = json::parse("[1, [2, 2], [2, 3], [4, 6], [6, 9], [10, 15], [14, 21]]");
  j["transformer"]["apply_spatial_patchify"] = 1;
  j["transformer"]["cos_attn"] = 0;
  j["transformer"]["shared_aln"] = false;
  j["transformer"]["cfg_insertion_layer"] = {-3, 0};
  j["transformer"]["swiglu"] = false;
  j["transformer"]["rms_norm"] = 0;
  j["transformer"]["head_aln"] = true;
  j["transformer"]["use_bit_label"] = 1;
  j["defaults"] = {{"cfg", {1, 2, 3, 4, 5, 6, 7.5}}, {"tau", 0.5}};
  const ModelConfig config = parse_model_config(j.dump(), "x");
  EXPECT_EQ(config.schedule.back(), (Grid{14, 21}));
  EXPECT_EQ(config.rope_grid, (Grid{52, 78}));  // of ratio 0.666, though 0.06M runs
  EXPECT_EQ(config.transformer.bits(), 64);
  EXPECT_FALSE(config.transformer.cos_attn);
  EXPECT_EQ(config.transformer.cfg_insertion_layer, (std::vector<int>{-3, 0}));
  EXPECT_EQ(config.default_cfg.size(), 7U);
  EXPECT_EQ(config.default_cfg[6], 7.5F);
  j["transformer"]["cfg_insertion_layer"] = -1;
  j["rope_grid"] = {30, 40};
  EXPECT_EQ(parse_model_config(j.dump(), "x").rope_grid, (Grid{30, 40}));
  EXPECT_EQ(parse_model_config(j.dump(), "x").transformer.cfg_insertion_layer, std::vector<int>{-1});
}

TEST(Config, RopeGridOfAScheduleThatUpstreamDoesNotHave) {
  json j = minimal();
  j["scales"] = json::parse("[1, [2, 3], [5, 9]]");
  EXPECT_EQ(parse_model_config(j.dump(), "x").rope_grid, (Grid{5, 9}));
}

TEST(Config, FeedForwardWidthIsRoundedToMultiplesOf256) {
  InfinityConfig config;
  for (const auto& [width, ratio, expected] : std::vector<std::tuple<int, double, int>>{
           {80, 4.0, 256}, {64, 4.0, 256}, {2048, 4.0, 8192}, {3584, 4.0, 14336}, {160, 4.0, 512}, {96, 4.0, 512}}) {
    config.embed_dim = width;
    config.mlp_ratio = ratio;
    EXPECT_EQ(config.ffn_dim(), expected) << width;
  }
}

struct BadValue {
  const char* name;
  const char* pointer;  // JSON pointer of the value that is replaced
  const char* value;    // JSON; empty: the key is taken away
  std::vector<std::string> expected;
};

void PrintTo(const BadValue& bad, std::ostream* out) { *out << bad.name; }

std::vector<BadValue> bad_values() {
  return {
      // types
      {"DepthAsText", "/transformer/depth", R"("eight")", {"transformer.depth", "integer from 1 to 256", "'eight'"}},
      {"DepthAsFraction", "/transformer/depth", "8.0", {"transformer.depth", "integer", "8.0"}},
      {"DepthAsBoolean", "/transformer/depth", "true", {"transformer.depth", "integer", "true"}},
      {"DepthNull", "/transformer/depth", "null", {"transformer.depth", "integer", "null"}},
      {"DepthAsList", "/transformer/depth", "[4]", {"transformer.depth", "integer", "[4]"}},
      {"FlagAsText", "/transformer/cos_attn", R"("yes")", {"transformer.cos_attn", "true or false", "'yes'"}},
      {"FlagTwo", "/transformer/nm0", "2", {"transformer.nm0", "true or false", "2"}},
      {"EpsilonAsText", "/transformer/norm_eps", R"("1e-6")", {"transformer.norm_eps", "number", "'1e-6'"}},
      {"TransformerAsList", "/transformer", "[]", {"transformer", "expected an object", "[]"}},
      {"VaeAsNumber", "/vae", "3", {"vae", "expected an object", "3"}},
      {"TextEncoderNull", "/text_encoder", "null", {"text_encoder", "expected an object", "null"}},
      {"DefaultsAsNumber", "/defaults", "3", {"defaults", "expected an object", "3"}},
      {"ArchitectureAsNumber", "/architecture", "1", {"architecture", "text", "1"}},
      {"ChMultAsNumber", "/vae/ch_mult", "1", {"vae.ch_mult", "list of 1 to 6 integers", "1"}},
      {"ChMultOfTexts", "/vae/ch_mult", R"(["1"])", {"vae.ch_mult", "integer", "'1'"}},
      // ranges, huge numbers and products
      {"DepthZero", "/transformer/depth", "0", {"transformer.depth", "from 1", "0"}},
      {"DepthNegative", "/transformer/depth", "-4", {"transformer.depth", "from 1", "-4"}},
      {"DepthTwoTo31", "/transformer/depth", "2147483648", {"transformer.depth", "to 256", "2147483648"}},
      {"DepthTwoTo32Plus4", "/transformer/depth", "4294967300", {"transformer.depth", "4294967300"}},
      {"DepthTwoTo64Minus1",
       "/transformer/depth",
       "18446744073709551615",
       {"transformer.depth", "18446744073709551615"}},
      {"DepthTwoTo64Plus4", "/transformer/depth", "18446744073709551620", {"transformer.depth", "integer"}},
      {"DepthMostNegative", "/transformer/depth", "-9223372036854775808", {"transformer.depth", "integer"}},
      {"GuidanceTwoTo64Minus1",
       "/transformer/cfg_insertion_layer",
       "[18446744073709551615]",
       {"cfg_insertion_layer", "integer"}},
      {"WidthThatWraps", "/transformer/embed_dim", "1073741824", {"transformer.embed_dim", "to 16384", "1073741824"}},
      {"TextMaxlenHuge", "/transformer/text_maxlen", "1000000", {"transformer.text_maxlen", "1000000"}},
      {"CodebookDimHuge", "/transformer/codebook_dim", "1000000", {"transformer.codebook_dim", "to 64"}},
      {"MlpRatioHuge", "/transformer/mlp_ratio", "1e300", {"transformer.mlp_ratio", "to 16", "1e+300"}},
      {"MlpRatioNegative", "/transformer/mlp_ratio", "-4", {"transformer.mlp_ratio", "-4"}},
      {"MlpRatioThatLeavesNothing", "/transformer/mlp_ratio", "0.1", {"transformer.mlp_ratio", "0.1 * 64 / 256"}},
      {"EpsilonZero", "/transformer/norm_eps", "0", {"transformer.norm_eps", "0"}},
      {"RopeBaseZero", "/transformer/rope_base", "0", {"transformer.rope_base", "from 1"}},
      {"NormalisationThree",
       "/transformer/rope2d_normalized_by_hw",
       "3",
       {"rope2d_normalized_by_hw", "from 0 to 2", "3"}},
      {"ChannelProductTooWide", "/vae/ch_mult", "[1,1,1,1,64000]", {"vae.ch_mult", "64000"}},
      {"VaeChannelsTooWide",
       "/vae",
       R"({"codebook_dim":16,"ch":4096,"ch_mult":[1,1,1,1,64]})",
       {"vae.ch_mult", "4096 * 64"}},
      {"TextWidthTooWide", "/text_encoder/num_heads", "1025", {"text_encoder.num_heads", "to 1024"}},
      {"TextHeadsProductTooWide",
       "/text_encoder",
       R"({"vocab_size":100,"d_model":128,"d_ff":160,"num_layers":3,"num_heads":1024,"d_kv":512})",
       {"text_encoder.d_kv", "num_heads * d_kv", "524288"}},
      {"VocabularyHuge", "/text_encoder/vocab_size", "1000000000000", {"text_encoder.vocab_size", "1000000000000"}},
      // values that do not fit together
      {"HeadsNotDividing", "/transformer/num_heads", "5", {"transformer.num_heads", "divisor of embed_dim 64", "5"}},
      {"HeadDimNotMultipleOf4", "/transformer/num_heads", "32", {"transformer.num_heads", "multiple of 4", "2"}},
      {"HeadDimTooLarge",
       "/transformer",
       R"({"depth":4,"embed_dim":512,"num_heads":1,"text_channels":128,"codebook_dim":16})",
       {"transformer.num_heads", "up to 256", "512"}},
      {"ChunksNotDividing", "/transformer/block_chunks", "3", {"transformer.block_chunks", "divisor of depth 4", "3"}},
      {"ChunksZero", "/transformer/block_chunks", "0", {"transformer.block_chunks", "from 1"}},
      {"TextPoolWithoutHeads", "/transformer/text_channels", "100", {"transformer.text_channels", "0 heads"}},
      {"TextPoolHeadsNotDividing",
       "/transformer/text_channels",
       "640",
       {"transformer.text_channels", "5 heads", "embed_dim 64"}},
      {"GuidanceLayerPositive",
       "/transformer/cfg_insertion_layer",
       "[1]",
       {"cfg_insertion_layer", "from -3 to 0", "1"}},
      {"GuidanceLayerTooDeep", "/transformer/cfg_insertion_layer", "-4", {"cfg_insertion_layer", "from -3 to 0", "-4"}},
      {"GuidanceLayersEmpty", "/transformer/cfg_insertion_layer", "[]", {"cfg_insertion_layer", "list of 1 to 4"}},
      {"VaeCodebookDiffers", "/vae/codebook_dim", "14", {"vae.codebook_dim", "transformer.codebook_dim 16", "14"}},
      {"PatchSizeNotOfLevels", "/vae/patch_size", "8", {"vae.patch_size", "expected 16", "5 levels", "8"}},
      {"LevelsNotOfPatchSize", "/vae/ch_mult", "[1,1,1,1]", {"vae.patch_size", "expected 8", "16"}},
      {"ChMultEmpty", "/vae/ch_mult", "[]", {"vae.ch_mult", "list of 1 to 6", "[]"}},
      {"ChMultTooLong", "/vae/ch_mult", "[1,1,1,1,1,1,1,1]", {"vae.ch_mult", "a list of 8"}},
      {"ChMultZero", "/vae/ch_mult", "[1,1,0,1,1]", {"vae.ch_mult", "from 1 to 64", "0"}},
      {"GroupsNotDividing",
       "/vae/norm_num_groups",
       "24",
       {"vae.norm_num_groups", "divisor of ch * ch_mult = 32", "24"}},
      {"GroupsZero", "/vae/norm_num_groups", "0", {"vae.norm_num_groups", "from 1"}},
      {"TextWidthDiffers",
       "/text_encoder/d_model",
       "64",
       {"text_encoder.d_model", "transformer.text_channels 128", "64"}},
      {"BucketsNotMultipleOf4",
       "/text_encoder/relative_attention_num_buckets",
       "6",
       {"num_buckets", "multiple of 4", "6"}},
      {"BucketDistanceTooSmall",
       "/text_encoder/relative_attention_max_distance",
       "8",
       {"max_distance", "more than", "8"}},
      // what is not supported
      {"OtherArchitecture", "/architecture", R"("var")", {"architecture", "only 'infinity' is supported", "'var'"}},
      {"SwiGlu", "/transformer/swiglu", "true", {"transformer.swiglu", "only false is supported", "true"}},
      {"RmsNorm", "/transformer/rms_norm", "1", {"transformer.rms_norm", "only false is supported", "1"}},
      {"PlainHead", "/transformer/head_aln", "false", {"transformer.head_aln", "only true is supported", "false"}},
      {"IndexLabels", "/transformer/use_bit_label", "0", {"transformer.use_bit_label", "only true is supported", "0"}},
      {"SharedRope", "/transformer/rope2d_each_sa_layer", "0", {"rope2d_each_sa_layer", "only true is supported", "0"}},
      {"VaeAttention", "/vae/attention", "true", {"vae.attention", "only false is supported", "true"}},
      {"OtherTextEncoder",
       "/text_encoder/type",
       R"("clip")",
       {"text_encoder.type", "only 't5' is supported", "'clip'"}},
      {"OtherActivation",
       "/text_encoder/feed_forward_proj",
       R"("relu")",
       {"feed_forward_proj", "only 'gated-gelu'", "'relu'"}},
      // schedules
      {"NoScales", "/scales", "", {"scales", "missing"}},
      {"ScalesEmpty", "/scales", "[]", {"scales", "1 to 64 scales", "[]"}},
      {"ScalesAsNumber", "/scales", "13", {"scales", "1 to 64 scales", "13"}},
      {"ScalesAsText", "/scales", R"("1,2,4")", {"scales", "1 to 64 scales"}},
      {"ScaleZero", "/scales", "[1, 0]", {"scales", "sides from 1 to 512", "0"}},
      {"ScaleNegative", "/scales", "[1, -2]", {"scales", "sides from 1 to 512", "-2"}},
      {"ScaleTooLarge", "/scales", "[1, 513]", {"scales", "sides from 1 to 512", "513"}},
      {"ScaleHuge", "/scales", "[1, 18446744073709551615]", {"scales", "sides from 1 to 512", "18446744073709551615"}},
      {"ScaleFraction", "/scales", "[1, 2.5]", {"scales", "sides from 1 to 512", "2.5"}},
      {"ScaleOfThree", "/scales", "[1, [1, 2, 2]]", {"scales", "n or [h, w]", "[1,2,2]"}},
      {"ScaleNested", "/scales", "[1, [[2], 2]]", {"scales", "n or [h, w]"}},
      {"ScaleNull", "/scales", "[1, null]", {"scales", "n or [h, w]", "null"}},
      {"ScalesDoNotBeginWithOne", "/scales", "[2, 4]", {"scales", "1x1 first", "2x2"}},
      {"ScalesShrink", "/scales", "[1, 4, 2]", {"scales", "do not shrink", "2x2 after 4x4"}},
      {"ScalesShrinkInOneDirection", "/scales", "[1, [4, 4], [8, 3]]", {"scales", "do not shrink", "8x3 after 4x4"}},
      {"PictureTooLarge",
       "/vae",
       R"({"codebook_dim":16,"ch":32,"ch_mult":[1,1,1,1,1,1],"patch_size":64})",
       {"vae.patch_size", "to 32"}},
      {"RopeGridZero", "/rope_grid", "[0, 64]", {"rope_grid", "sides from 1 to 512", "[0,64]"}},
      {"RopeGridAsText", "/rope_grid", R"("64x64")", {"rope_grid", "n or [h, w]", "'64x64'"}},
      // defaults
      {"CfgAsText", "/defaults", R"({"cfg":"4"})", {"defaults.cfg", "number", "'4'"}},
      {"CfgNegative", "/defaults", R"({"cfg":-1})", {"defaults.cfg", "from 0", "-1"}},
      {"CfgTooFew", "/defaults", R"({"cfg":[1,2]})", {"defaults.cfg", "list of 3, one for each scale", "[1,2]"}},
      {"CfgOfNulls", "/defaults", R"({"cfg":[1,null,3]})", {"defaults.cfg", "number", "null"}},
      {"TauZero", "/defaults", R"({"tau":0})", {"defaults.tau", "from 0.001", "0"}},
      {"TauHuge", "/defaults", R"({"tau":1e39})", {"defaults.tau", "to 1000"}},
      // keys
      {"NoArchitecture", "/architecture", "", {"architecture", "missing"}},
      {"NoTransformer", "/transformer", "", {"transformer", "missing"}},
      {"NoDepth", "/transformer/depth", "", {"transformer.depth", "missing"}},
      {"NoChMult", "/vae/ch_mult", "", {"vae.ch_mult", "missing"}},
      {"NoVocabulary", "/text_encoder/vocab_size", "", {"text_encoder.vocab_size", "missing"}},
      {"UnknownAtTheTop", "/scale", "[1]", {"unknown key 'scale'", "did you mean 'scales'?"}},
      {"UnknownInTransformer",
       "/transformer/depht",
       "4",
       {"unknown key 'depht' in transformer", "did you mean 'depth'?"}},
      {"UnknownSpelling",
       "/transformer/add_lvl_embedding_only_first_block",
       "1",
       {"did you mean 'add_lvl_embeding_only_first_block'?"}},
      {"UnknownInVae", "/vae/num_resblocks", "2", {"in vae", "did you mean 'num_res_blocks'?"}},
      {"UnknownInTextEncoder", "/text_encoder/layers", "2", {"in text_encoder", "did you mean 'num_layers'?"}},
      {"UnknownInDefaults", "/defaults", R"({"temperature":1})", {"'temperature' in defaults", "did you mean '"}},
  };
}

class BadConfig : public ::testing::TestWithParam<BadValue> {};

TEST_P(BadConfig, IsRefusedNamingTheKey) {
  json j = minimal();
  const json::json_pointer pointer(GetParam().pointer);
  if (*GetParam().value == '\0')
    j[pointer.parent_pointer()].erase(pointer.back());
  else
    j[pointer] = json::parse(GetParam().value);
  const std::string message = error_of(j.dump());
  EXPECT_EQ(message.find("x/config.json: "), 0U) << message;
  for (const std::string& part : GetParam().expected)
    EXPECT_NE(message.find(part), std::string::npos) << part << " in: " << message;
}

INSTANTIATE_TEST_SUITE_P(Cases, BadConfig, ::testing::ValuesIn(bad_values()),
                         [](const auto& tested) { return std::string(tested.param.name); });

struct BadText {
  const char* name;
  std::string text;
  std::string expected;
};

void PrintTo(const BadText& bad, std::ostream* out) { *out << bad.name; }

std::string replaced(const std::string& from, const std::string& to) {
  std::string text = minimal().dump();
  const std::size_t at = text.find(from);
  if (at == std::string::npos) throw std::runtime_error(from + " is not in the config");
  return text.replace(at, from.size(), to);
}

std::string many_scales(int count) {
  json scales = json::array();
  for (int i = 0; i < count; ++i) scales.push_back(1);
  json j = minimal();
  j["scales"] = std::move(scales);
  return j.dump();
}

std::vector<BadText> bad_texts() {
  return {
      {"Empty", "", "not valid JSON"},
      {"NotJson", "depth: 4", "not valid JSON"},
      {"List", "[]", "the file: expected an object"},
      {"Cut", minimal().dump().substr(0, 100), "not valid JSON"},
      {"NaN", replaced("\"depth\":4", "\"depth\":NaN"), "not valid JSON"},
      {"Infinity", replaced("\"depth\":4", "\"norm_eps\":Infinity,\"depth\":4"), "not valid JSON"},
      {"NumberAboveDouble", replaced("\"depth\":4", "\"norm_eps\":1e999,\"depth\":4"), "not valid JSON"},
      {"NotUtf8", replaced("\"infinity\"", "\"\xc3\x28\""), "not valid JSON"},
      {"NulByte", minimal().dump() + std::string(1, '\0'), "not valid JSON"},
      {"KeyTwice", replaced("\"depth\":4", "\"depth\":4,\"depth\":5"), "'depth' is there twice"},
      {"SectionTwice", replaced("\"scales\":", "\"vae\":{},\"scales\":"), "'vae' is there twice"},
      {"DeepLists", replaced("[1,2,4]", std::string(400'000, '[')), "nested deeper than 16"},
      {"DeepBalanced", replaced("[1,2,4]", std::string(20, '[') + std::string(20, ']')), "nested deeper than 16"},
      {"SixtyFiveScales", many_scales(65), "expected a list of 1 to 64 scales, found a list of 65"},
      {"AHundredThousandScales", many_scales(100'000), "found a list of 100000"},
      {"AMillionScales", many_scales(1'000'000), "expected at most 1000000"},
      {"LongKey", replaced("\"depth\"", '"' + std::string(900'000, 'k') + '"'), "unknown key 'kkk"},
      {"KeyWithLineEnds", replaced("\"depth\"", "\"de\\npth\""), "unknown key 'de?pth'"},
      {"EmptyKey", replaced("\"depth\"", "\"\""), "unknown key ''"},
  };
}

class BadConfigText : public ::testing::TestWithParam<BadText> {};

TEST_P(BadConfigText, IsRefused) {
  const std::string message = error_of(GetParam().text);
  EXPECT_EQ(message.find("x/config.json: "), 0U) << message;
  EXPECT_NE(message.find(GetParam().expected), std::string::npos) << message;
  EXPECT_LT(message.size(), 600U);
}

INSTANTIATE_TEST_SUITE_P(Cases, BadConfigText, ::testing::ValuesIn(bad_texts()),
                         [](const auto& tested) { return std::string(tested.param.name); });

TEST(Config, SixtyFourScalesAreAccepted) { EXPECT_EQ(error_of(many_scales(64)), "accepted"); }

TEST(Config, PictureLargerThanTheLimit) {
  json j = minimal();
  j["scales"] = {1, 512};
  j["vae"] = json::parse(R"({"codebook_dim":16,"ch":32,"ch_mult":[1,1,1,1,1,1],"patch_size":32})");
  EXPECT_EQ(error_of(j.dump()), "accepted");  // 16384 pixels
  j["transformer"]["apply_spatial_patchify"] = true;
  EXPECT_NE(error_of(j.dump()).find("at most 16384 pixels a side, found 32768x32768"), std::string::npos);
}

std::string file_error(const std::string& path) {
  try {
    read_model_config(path);
  } catch (const Error& failure) {
    return failure.what();
  }
  return "accepted";
}

TEST(Config, MissingFileNamesTheFolderAndWhatAModelFolderHolds) {
  const TempFolder folder;
  const std::string message = file_error(folder.path("config.json"));
  const std::string name = std::filesystem::path(folder.path("config.json")).parent_path().string();
  EXPECT_NE(message.find("'" + name + "' is not a model folder"), std::string::npos) << message;
  EXPECT_NE(message.find("config.json, *.safetensors and spiece.model"), std::string::npos) << message;
}

TEST(Config, FileOverOneMegabyteIsNotRead) {
  const TempFolder folder;
  const std::string path = folder.write("config.json", minimal().dump());
  EXPECT_EQ(file_error(path), "accepted");
  std::filesystem::resize_file(path, 1U << 30);  // sparse: takes no room
  EXPECT_NE(file_error(path).find("1073741824 bytes long, expected at most 1000000"), std::string::npos);
}

TEST(Config, FolderInsteadOfFile) {
  const TempFolder folder;
  std::filesystem::create_directory(folder.path("config.json"));
  EXPECT_NE(file_error(folder.path("config.json")).find("expected a file, found a folder"), std::string::npos);
}

}  // namespace
}  // namespace sparvar
