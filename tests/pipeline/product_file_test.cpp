// The file that algorithms of products are kept in.
#include "pipeline/product_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "sparvar/error.h"

namespace sparvar {
namespace {

class ProductFileTest : public ::testing::Test {
 protected:
  ProductFileTest()
      : folder(std::filesystem::temp_directory_path() / ("sparvar-products-" + std::to_string(getpid()))) {
    std::filesystem::create_directories(folder);
    path = (folder / "products.json").string();
  }
  ~ProductFileTest() override { std::filesystem::remove_all(folder); }
  void put(const std::string& text) const { std::ofstream(path) << text; }

  std::filesystem::path folder;
  std::string path;
};

ProductChoices::Choice choice(std::uint64_t seed) {
  ProductChoices::Choice out{.algorithm = {}, .seconds = 1e-5 * static_cast<double>(seed)};
  for (std::size_t i = 0; i < out.algorithm.size(); ++i) out.algorithm[i] = seed * 0x9e3779b97f4a7c15ULL >> i;
  return out;
}

TEST_F(ProductFileTest, WhatOneProcessKeptAnotherFinds) {
  ProductFile first(path), second(path);
  EXPECT_FALSE(first.find("gpu", "a").has_value());
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_EQ(first.keep("gpu", "a", choice(1)), choice(1));
  EXPECT_EQ(first.keep("gpu", "b", choice(2)), choice(2));
  EXPECT_EQ(second.keep("gpu", "a", choice(3)), choice(1));  // the first has been faster
  EXPECT_EQ(second.keep("other gpu", "a", choice(4)), choice(4));
  const ProductFile third(path);
  EXPECT_EQ(third.find("gpu", "a"), choice(1));
  EXPECT_EQ(third.find("gpu", "b"), choice(2));
  EXPECT_EQ(third.find("other gpu", "a"), choice(4));
  EXPECT_FALSE(third.find("other gpu", "b").has_value());
}

TEST_F(ProductFileTest, AChoiceThatDidNotServeIsReplaced) {
  ProductFile(path).keep("gpu", "a", choice(1));
  ProductFile later(path);
  ASSERT_TRUE(later.find("gpu", "a").has_value());
  EXPECT_EQ(later.keep("gpu", "a", choice(5)), choice(5));
  EXPECT_EQ(ProductFile(path).find("gpu", "a"), choice(5));
}

TEST_F(ProductFileTest, OtherFilesAreRefusedAndLeftAlone) {
  for (
      const char* text :
      {"", "{}", "[]", R"({"version": 2, "machines": {}})", R"({"version": 1, "machines": {"gpu": 3}})",
       R"({"version": 1, "machines": {"gpu": {"a": {"algorithm": ["0"], "seconds": 1}}}})",
       R"({"version": 1, "machines": {"gpu": {"a": {"algorithm": ["0","0","0","0","0","0","0","xyz"], "seconds": 1}}}})",
       R"({"version": 1, "machines": {"gpu": {"a": {"algorithm": ["0","0","0","0","0","0","0","1"], "seconds": "x"}}}})"}) {
    put(text);
    try {
      const ProductFile file(path);
      ADD_FAILURE() << text;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::input) << text;
      EXPECT_NE(std::string(error.what()).find("products.json"), std::string::npos) << error.what();
    }
    std::ifstream file(path);
    EXPECT_EQ(std::string(std::istreambuf_iterator<char>(file), {}), text);
  }
}

TEST_F(ProductFileTest, TheEnvironmentNamesIt) {
  ::unsetenv("SPARVAR_PRODUCTS");
  EXPECT_EQ(product_choices_of_environment(), nullptr);
  ::setenv("SPARVAR_PRODUCTS", path.c_str(), 1);
  EXPECT_NE(product_choices_of_environment(), nullptr);
  ::unsetenv("SPARVAR_PRODUCTS");
}

}  // namespace
}  // namespace sparvar
