// The algorithms of large products, kept in a file: what one process measured, every other one takes.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "backend/backend.h"

namespace sparvar {

/// JSON: {"version": 1, "machines": {MACHINE: {PRODUCT: {"algorithm": [eight words in hexadecimal], "seconds": S}}}}.
class ProductFile final : public ProductChoices {
 public:
  /// A file that is not there is made when the first choice is kept. Throws Error(input) where it holds something else.
  explicit ProductFile(std::string path);
  std::optional<Choice> find(const std::string& machine, const std::string& product) const override;
  Choice keep(const std::string& machine, const std::string& product, const Choice& choice) override;

 private:
  using Choices = std::map<std::string, std::map<std::string, Choice>>;
  Choices read() const;
  void write() const;

  std::string path_;
  Choices choices_;
};

/// The file that SPARVAR_PRODUCTS names; null where it names none.
std::shared_ptr<ProductChoices> product_choices_of_environment();

}  // namespace sparvar
