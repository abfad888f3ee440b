#include "pipeline/product_file.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "core/open_file.h"
#include "image/atomic_file.h"
#include "sparvar/error.h"
#include "weights/strict_json.h"

namespace sparvar {
namespace {

constexpr std::uint64_t kMostBytes = 16 << 20;
constexpr int kMostDepth = 6;
constexpr int kVersion = 1;

[[noreturn]] void refuse(const std::string& path, const std::string& why) {
  throw Error(
      ErrorKind::input,
      fmt::format("{}: {}; it is not a file of choices of products (SPARVAR_PRODUCTS): name or remove another one",
                  path, why));
}

std::uint64_t word_of(const nlohmann::json& value, const std::string& path) {
  std::uint64_t word = 0;
  if (value.is_string()) {
    const auto& text = value.get_ref<const std::string&>();
    const char* const end = text.data() + text.size();
    const auto [stop, status] = std::from_chars(text.data(), end, word, 16);
    if (status == std::errc{} && stop == end) return word;
  }
  refuse(path, fmt::format("{} is no word of an algorithm", describe(value)));
}

ProductChoices::Choice choice_of(const nlohmann::json& value, const std::string& path) {
  const auto member = [&](const char* name) -> const nlohmann::json& {
    if (!value.is_object() || !value.contains(name)) refuse(path, fmt::format("a choice has no '{}'", name));
    return value[name];
  };
  ProductChoices::Choice out;
  const nlohmann::json& words = member("algorithm");
  const nlohmann::json& seconds = member("seconds");
  if (!words.is_array() || words.size() != out.algorithm.size()) refuse(path, "an algorithm has eight words");
  for (std::size_t i = 0; i < words.size(); ++i) out.algorithm[i] = word_of(words[i], path);
  if (!seconds.is_number() || !(seconds.get<double>() >= 0)) refuse(path, "the seconds of a choice are no time");
  out.seconds = seconds.get<double>();
  return out;
}

}  // namespace

ProductFile::ProductFile(std::string path) : path_(std::move(path)), choices_(read()) {}

ProductFile::Choices ProductFile::read() const {
  std::error_code error;
  if (!std::filesystem::exists(path_, error)) return {};
  const nlohmann::json file = parse_json(read_text(path_, kMostBytes), path_, kMostDepth);
  if (!file.is_object() || !file.contains("version") || file["version"] != kVersion || !file.contains("machines") ||
      !file["machines"].is_object())
    refuse(path_, fmt::format("no version {} with machines", kVersion));
  Choices out;
  for (const auto& [machine, products] : file["machines"].items()) {
    if (!products.is_object()) refuse(path_, fmt::format("{} has no products", quoted_name(machine)));
    for (const auto& [product, choice] : products.items()) out[machine][product] = choice_of(choice, path_);
  }
  return out;
}

std::optional<ProductChoices::Choice> ProductFile::find(const std::string& machine, const std::string& product) const {
  const auto products = choices_.find(machine);
  if (products == choices_.end()) return std::nullopt;
  const auto found = products->second.find(product);
  return found == products->second.end() ? std::nullopt : std::optional(found->second);
}

/// What another process has kept since comes first.
ProductChoices::Choice ProductFile::keep(const std::string& machine, const std::string& product, const Choice& choice) {
  Choices now = read();
  const bool replaces = find(machine, product).has_value();  // it was there, and did not serve
  Choice& kept = now[machine].try_emplace(product, choice).first->second;
  if (replaces) kept = choice;
  choices_ = std::move(now);
  write();
  return *find(machine, product);
}

void ProductFile::write() const {
  nlohmann::json machines = nlohmann::json::object();
  for (const auto& [machine, products] : choices_)
    for (const auto& [product, choice] : products) {
      nlohmann::json words = nlohmann::json::array();
      for (const std::uint64_t word : choice.algorithm) words.push_back(fmt::format("{:x}", word));
      machines[machine][product] = {{"algorithm", std::move(words)}, {"seconds", choice.seconds}};
    }
  const std::string text = nlohmann::json{{"version", kVersion}, {"machines", std::move(machines)}}.dump(1) + "\n";
  write_file_atomically(path_, {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
}

std::shared_ptr<ProductChoices> product_choices_of_environment() {
  const char* const path = std::getenv("SPARVAR_PRODUCTS");
  if (path == nullptr || *path == '\0') return nullptr;
  return std::make_shared<ProductFile>(path);
}

}  // namespace sparvar
