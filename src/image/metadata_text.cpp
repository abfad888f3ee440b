#include "image/metadata_text.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "sparvar/error.h"

namespace sparvar {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kOpen = "<sparvar:settings>";
constexpr std::string_view kClose = "</sparvar:settings>";

struct Entity {
  std::string_view name;
  char character;
};
constexpr Entity kEntities[] = {{"&amp;", '&'}, {"&lt;", '<'}, {"&gt;", '>'}};

std::string escaped(std::string_view text) {
  std::string out;
  for (const char c : text) {
    std::string_view piece(&c, 1);
    for (const Entity& entity : kEntities)
      if (entity.character == c) piece = entity.name;
    out += piece;
  }
  return out;
}

std::string unescaped(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    std::size_t taken = 1;
    char c = text.front();
    for (const Entity& entity : kEntities)
      if (text.starts_with(entity.name)) {
        c = entity.character;
        taken = entity.name.size();
      }
    out += c;
    text.remove_prefix(taken);
  }
  return out;
}

}  // namespace

void check_keywords(const ImageMetadata& metadata) {
  for (const auto& [keyword, value] : metadata) {
    bool printable = !keyword.empty() && keyword.size() <= 79 && keyword.front() != ' ' && keyword.back() != ' ';
    for (const char c : keyword) printable = printable && c >= ' ' && c <= '~';
    if (!printable)
      throw Error(ErrorKind::usage,
                  fmt::format("'{}' cannot be the keyword of a picture's text: 1 to 79 ASCII letters", keyword));
  }
}

std::string to_json_text(const ImageMetadata& metadata) {
  Json object = Json::object();
  for (const auto& [keyword, value] : metadata) object[keyword] = value;
  return object.dump(-1, ' ', false, Json::error_handler_t::replace);
}

ImageMetadata from_json_text(std::string_view text) {
  if (text.empty()) return {};
  // What is nested is none of ours, and how deep it goes is not ours to find out.
  const auto flat = [](int depth, Json::parse_event_t, Json&) { return depth <= 1; };
  const Json object = Json::parse(text, flat, false);
  ImageMetadata metadata;
  if (object.is_object())
    for (const auto& [keyword, value] : object.items())
      if (value.is_string()) metadata.emplace_back(keyword, value.get<std::string>());
  if (metadata.empty()) metadata.emplace_back("Comment", text);
  return metadata;
}

std::string to_xmp(const ImageMetadata& metadata) {
  // JSON escapes the control characters that XML cannot hold.
  return fmt::format(
      "<?xpacket begin=\"\xEF\xBB\xBF\" id=\"W5M0MpCehiHzreSzNTczkc9d\"?>\n"
      "<x:xmpmeta xmlns:x=\"adobe:ns:meta/\"><rdf:RDF xmlns:rdf=\"http://www.w3.org/1999/02/22-rdf-syntax-ns#\">"
      "<rdf:Description rdf:about=\"\" xmlns:sparvar=\"urn:sparvar:settings\">{}{}{}</rdf:Description>"
      "</rdf:RDF></x:xmpmeta>\n<?xpacket end=\"r\"?>",
      kOpen, escaped(to_json_text(metadata)), kClose);
}

ImageMetadata from_xmp(std::string_view packet) {
  const std::size_t open = packet.find(kOpen);
  if (open == std::string_view::npos) return {};
  packet.remove_prefix(open + kOpen.size());
  const std::size_t close = packet.find(kClose);
  if (close == std::string_view::npos) return {};
  return from_json_text(unescaped(packet.substr(0, close)));
}

}  // namespace sparvar
