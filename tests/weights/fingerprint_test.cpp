// A folder's fingerprint: what it tells apart.
#include "weights/fingerprint.h"

#include <gtest/gtest.h>

#include <functional>
#include <set>
#include <string>

#include "sparvar/error.h"
#include "temp_folder.h"

namespace sparvar {
namespace {

std::string with(const std::function<void(const testing::TempFolder&)>& change) {
  const testing::TempFolder folder;
  folder.write("config.json", "{}");
  folder.write("vae.safetensors", std::string(2'000'000, 'a'));
  folder.write("README.md", "read me");
  change(folder);
  return fingerprint(folder.path());
}

TEST(Fingerprint, TellsModelsApartAndNothingElse) {
  const std::string plain = with([](const auto&) {});
  EXPECT_EQ(plain.size(), 16U);
  EXPECT_EQ(plain, with([](const auto&) {})) << "not the folder's name, not the time";
  EXPECT_EQ(plain, with([](const auto& f) { f.write("README.md", "other"); }));
  std::set<std::string> seen{plain};
  const auto differs = [&](const char* what, const std::function<void(const testing::TempFolder&)>& change) {
    EXPECT_TRUE(seen.insert(with(change)).second) << what;
  };
  differs("config", [](const auto& f) { f.write("config.json", "{ }"); });
  differs("another file", [](const auto& f) { f.write("text_encoder.safetensors", "x"); });
  differs("size", [](const auto& f) { f.write("vae.safetensors", std::string(2'000'001, 'a')); });
  differs("first byte", [](const auto& f) { f.write("vae.safetensors", 'b' + std::string(1'999'999, 'a')); });
  differs("last byte", [](const auto& f) { f.write("vae.safetensors", std::string(1'999'999, 'a') + 'b'); });
  differs("values", [](const auto& f) { f.write("vae.safetensors", std::string(2'000'000, 'b')); });
  differs("name",
          [](const auto& f) { std::filesystem::rename(f.path("vae.safetensors"), f.path("transformer.safetensors")); });
}

TEST(Fingerprint, NamesAFolderThatCannotBeRead) {
  try {
    fingerprint("/nowhere/model");
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("/nowhere/model"), std::string::npos);
  }
}

}  // namespace
}  // namespace sparvar
