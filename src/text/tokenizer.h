// sentencepiece tokenizer with T5's conventions (special tokens in the text, </s> at the end).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace sparvar {

class Tokenizer {
 public:
  /// `path`: spiece.model. `extra_ids`: how many <extra_id_N> follow the pieces (T5: 100; 0 where the embedding has
  /// none).
  Tokenizer(const std::string& path, int extra_ids);
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();
  /// Ids with </s> appended, at most max_length in all. Throws Error(usage) for invalid UTF-8, with the byte's
  /// position.
  std::vector<std::int32_t> encode(const std::string& text, int max_length = 512) const;
  int vocabulary() const;  // pieces + extra ids

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sparvar
