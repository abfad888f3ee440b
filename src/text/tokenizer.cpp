#include "text/tokenizer.h"

#include <fmt/format.h>
#include <sentencepiece_processor.h>

#include <algorithm>
#include <filesystem>
#include <string_view>

#include "core/utf8.h"
#include "sparvar/error.h"

namespace sparvar {

struct Tokenizer::Impl {
  sentencepiece::SentencePieceProcessor processor;
  int pieces = 0;
  int extra_ids = 0;
  int eos = 1;

  /// A special token at the start of `text`: its id and length; id -1 where there is none.
  std::pair<int, std::size_t> special(std::string_view text) const {
    for (const std::string_view name : {"</s>", "<pad>", "<unk>"})
      if (text.starts_with(name)) return {processor.PieceToId(std::string(name)), name.size()};
    constexpr std::string_view kExtra = "<extra_id_";
    if (!text.starts_with(kExtra)) return {-1, 0};
    std::size_t at = kExtra.size();
    int number = 0;
    while (at < text.size() && at < kExtra.size() + 3 && text[at] >= '0' && text[at] <= '9')
      number = number * 10 + (text[at++] - '0');
    const bool plain = at > kExtra.size() && at < text.size() && text[at] == '>' &&
                       (text[kExtra.size()] != '0' || at == kExtra.size() + 1);
    if (!plain || number >= extra_ids) return {-1, 0};
    return {pieces + extra_ids - 1 - number, at + 1};
  }

  void append(std::string_view text, std::vector<std::int32_t>& ids) const {
    if (text.empty()) return;
    std::vector<int> part;
    if (!processor.Encode(std::string(text), &part).ok())
      throw Error(ErrorKind::input, "the tokenizer could not read the prompt");
    ids.insert(ids.end(), part.begin(), part.end());
  }
};

Tokenizer::Tokenizer(const std::string& path, int extra_ids) : impl_(std::make_unique<Impl>()) {
  if (!std::filesystem::is_regular_file(path))
    throw Error(ErrorKind::input,
                fmt::format("{}: not there; a model folder holds config.json, *.safetensors and spiece.model", path));
  const auto status = impl_->processor.Load(path);
  if (!status.ok() || impl_->processor.GetPieceSize() == 0)
    throw Error(ErrorKind::input, fmt::format("{}: not a sentencepiece model", path));
  impl_->pieces = impl_->processor.GetPieceSize();
  impl_->extra_ids = extra_ids;
  impl_->eos = impl_->processor.eos_id() >= 0 ? impl_->processor.eos_id() : 1;
}

Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

int Tokenizer::vocabulary() const { return impl_->pieces + impl_->extra_ids; }

std::vector<std::int32_t> Tokenizer::encode(const std::string& text, int max_length) const {
  if (const std::size_t bad = first_invalid_byte(text); bad != std::string_view::npos)
    throw Error(ErrorKind::usage, fmt::format("the prompt is not UTF-8: byte {} is 0x{:02x}", bad,
                                              static_cast<unsigned char>(text[bad])));
  std::vector<std::int32_t> ids;
  std::string_view rest = text;
  std::size_t from = 0;
  for (std::size_t i = 0; i < rest.size();) {
    const auto [id, length] = rest[i] == '<' ? impl_->special(rest.substr(i)) : std::pair{-1, std::size_t{0}};
    if (id < 0) {
      ++i;
      continue;
    }
    impl_->append(rest.substr(from, i - from), ids);
    ids.push_back(id);
    i += length;
    from = i;
  }
  impl_->append(rest.substr(from), ids);
  if (static_cast<int>(ids.size()) > max_length - 1) ids.resize(max_length - 1);
  ids.push_back(impl_->eos);
  return ids;
}

}  // namespace sparvar
