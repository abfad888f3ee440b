// Ids and hidden states of the fixture are compared by the conformance program; here what prompts may do to the
// tokenizer.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>

#include "sparvar/error.h"
#include "support.h"
#include "text/t5_encoder.h"
#include "text/tokenizer.h"
#include "weights/safetensors.h"

namespace sparvar {
namespace {

Tokenizer tiny() { return {testing::data_dir() + "/t5-tiny/spiece.model", 100}; }

TEST(Tokenizer, EndsWithEos) {
  const auto ids = tiny().encode("Red heart");
  EXPECT_EQ(ids, (std::vector<std::int32_t>{11, 2, 42, 24, 1}));  // prompt 1 of the fixture
  EXPECT_EQ(tiny().encode(""), (std::vector<std::int32_t>{1}));
}

TEST(Tokenizer, SpecialTokensInsideTheText) {
  const Tokenizer tokenizer = tiny();
  const int last = tokenizer.vocabulary() - 1;
  const auto ids = tokenizer.encode("<extra_id_0></s><extra_id_99>");
  EXPECT_EQ(ids, (std::vector<std::int32_t>{last, 1, last - 99, 1}));
  const auto plain = tokenizer.encode("<extra_id_100> <extra_id_> <extra_id_007>");
  EXPECT_TRUE(std::all_of(plain.begin(), plain.end(), [&](int id) { return id < last - 99; }))
      << "none of these is a special token";
}

TEST(Tokenizer, TruncatesWithEos) {
  std::string text;
  for (int i = 0; i < 1000; ++i) text += "cat ";
  for (const int longest : {2, 64, 512}) {
    const auto ids = tiny().encode(text, longest);
    EXPECT_EQ(static_cast<int>(ids.size()), longest);
    EXPECT_EQ(ids.back(), 1);
  }
}

TEST(Tokenizer, OddPrompts) {
  const Tokenizer tokenizer = tiny();
  for (const std::string& text : {std::string(" "), std::string(100000, 'x'), std::string("a\0b", 3),
                                  std::string("\xd9\x85\xd8\xb1\xd8\xad\xd8\xa8\xd8\xa7"),
                                  std::string("\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x9a\x80"), std::string("<<<<</s"),
                                  std::string("line\r\nline")}) {
    const auto ids = tokenizer.encode(text);
    EXPECT_GE(ids.size(), 1U);
    EXPECT_LE(ids.size(), 512U);
    for (const int id : ids) {
      EXPECT_GE(id, 0);
      EXPECT_LT(id, tokenizer.vocabulary());
    }
  }
}

TEST(Tokenizer, InvalidUtf8NamesTheByte) {
  const std::pair<std::string, std::string> cases[] = {{"ab\xff", "byte 2"},        {"\x80", "byte 0"},
                                                       {"a\xc3", "byte 1"},         {"\xc0\xaf", "byte 0"},
                                                       {"x\xed\xa0\x80", "byte 1"}, {"\xf5\x80\x80\x80", "byte 0"},
                                                       {"\xe0\x80\xaf", "byte 0"},  {"ok\xf4\x90\x80\x80", "byte 2"}};
  for (const auto& [text, place] : cases) {
    try {
      tiny().encode(text);
      ADD_FAILURE() << place;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::usage);
      EXPECT_NE(std::string(error.what()).find(place), std::string::npos) << error.what();
    }
  }
}

TEST(Tokenizer, BadModelFiles) {
  EXPECT_THROW(Tokenizer("/nowhere/spiece.model", 0), Error);
  const std::string path = ::testing::TempDir() + "/sparvar-bad-spiece.model";
  for (const std::string& content : {std::string(), std::string("not a model"), std::string(1000, '\xff')}) {
    std::ofstream(path, std::ios::binary) << content;
    try {
      const Tokenizer tokenizer(path, 0);
      ADD_FAILURE() << "accepted " << content.size() << " bytes";
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(path), std::string::npos) << error.what();
    }
  }
  std::remove(path.c_str());
}

TEST(T5Encoder, RefusesIdsOutsideTheEmbedding) {
  const auto backend = make_cpu_backend({.compute = DType::f32, .threads = 1});
  const TensorFile weights = TensorFile::open(testing::data_dir() + "/t5-tiny/weights.safetensors");
  T5Encoder encoder({.vocab_size = 2128, .d_model = 64, .d_kv = 16, .d_ff = 160, .num_layers = 3, .num_heads = 4},
                    weights, *backend);
  EXPECT_THROW(encoder.encode({1, 2128}), Error);
  EXPECT_THROW(encoder.encode({-1}), Error);
  EXPECT_EQ(encoder.encode({5, 1}).shape(), (Shape{2, 64}));
}

}  // namespace
}  // namespace sparvar
