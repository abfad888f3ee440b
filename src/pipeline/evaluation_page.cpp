#include "pipeline/evaluation_page.h"

#include <fmt/format.h>

#include <cmath>

#include "pipeline/svg_plot.h"

namespace sparvar {
namespace {

constexpr const char* kStyle =
    "body{font-family:sans-serif;max-width:1320px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.3em .7em;border-bottom:1px solid #ccc;text-align:right}"
    "td:first-child,th:first-child{text-align:left}figure{margin:1em 0}img{max-width:100%}"
    ".plots{display:flex;flex-wrap:wrap;gap:1em}.plots svg{max-width:100%;height:auto}";

std::string fixed(double value, int decimals) {
  return std::isfinite(value) ? fmt::format("{:.{}f}", value, decimals) : std::string("-");
}

/// mean, worst, deviation
std::string cells(const Spread& spread, int decimals) {
  return fmt::format("<td>{}</td><td>{}</td><td>{}</td>", fixed(spread.mean, decimals), fixed(spread.worst, decimals),
                     fixed(spread.deviation, decimals));
}

std::string table(const std::vector<PageVariant>& variants) {
  std::string out =
      "<table>\n<tr><th>variant</th><th>PSNR dB</th><th>worst</th><th>&plusmn;</th><th>SSIM</th><th>worst</th>"
      "<th>&plusmn;</th><th>detail error</th><th>worst</th><th>&plusmn;</th><th>pairs, last 3 scales</th>"
      "<th>pairs, all</th><th>seconds</th><th>dense</th><th>speed-up</th><th>equal</th></tr>\n";
  for (std::size_t i = 0; i < variants.size(); ++i) {
    const VariantSummary& s = variants[i].summary;
    out += fmt::format(
        "<tr><td style=\"color:{}\">{}</td>{}{}{}<td>{:.1f} %</td><td>{:.1f} %</td><td>{:.3f}</td><td>{:.3f}</td>"
        "<td>{:.2f}x</td><td>{}</td></tr>\n",
        plot_colour(i), escaped(variants[i].name), cells(s.psnr, 2), cells(s.ssim, 4), cells(s.detail_error, 2),
        100 * s.pairs, 100 * s.all_pairs, s.seconds, s.dense_seconds, s.speed_up, s.equal);
  }
  return out + "</table>\n";
}

std::string plot(const std::vector<PageVariant>& variants, const PlotAxes& axes,
                 double (*x_of)(const VariantSummary&)) {
  std::vector<PlotPoint> points;
  for (const PageVariant& variant : variants) {
    const Spread& psnr = variant.summary.psnr;
    points.push_back({variant.name, x_of(variant.summary), psnr.mean, psnr.worst, psnr.mean});
  }
  return scatter_plot(points, axes);
}

}  // namespace

std::string base64(const std::vector<std::uint8_t>& bytes) {
  constexpr const char* kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  out.reserve((bytes.size() + 2) / 3 * 4);
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    const std::size_t left = std::min<std::size_t>(3, bytes.size() - i);
    std::uint32_t word = 0;
    for (std::size_t j = 0; j < 3; ++j) word = word << 8 | (j < left ? bytes[i + j] : 0);
    for (std::size_t j = 0; j < 4; ++j) out += j <= left ? kDigits[word >> (18 - 6 * j) & 63] : '=';
  }
  return out;
}

std::string evaluation_page(const std::string& title, const std::vector<std::string>& notes,
                            const std::vector<PageVariant>& variants) {
  std::string out = fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{0}</title><style>{1}</style></head>\n"
      "<body>\n<h1>{0}</h1>\n",
      escaped(title), kStyle);
  for (const std::string& note : notes) out += "<p>" + escaped(note) + "</p>\n";
  out += table(variants);
  out += "<div class=\"plots\">\n";
  out +=
      plot(variants, {"Quality against time", "seconds a picture", "PSNR against dense, dB: mean, line to the worst"},
           [](const VariantSummary& s) { return s.seconds; });
  out += plot(variants,
              {"Quality against pairs computed", "% of query-key pairs, last three scales",
               "PSNR against dense, dB: mean, line to the worst"},
              [](const VariantSummary& s) { return 100 * s.pairs; });
  out += "</div>\n";
  for (const PageVariant& variant : variants) {
    if (variant.worst.empty()) continue;
    out += fmt::format("<h2>{}: the worst pictures</h2>\n<p>Dense, {}, their difference times 4.</p>\n",
                       escaped(variant.name), escaped(variant.name));
    for (const PagePicture& picture : variant.worst)
      out += fmt::format(
          "<figure><img loading=\"lazy\" alt=\"{0}\" src=\"data:image/webp;base64,{1}\"><figcaption>{0}</figcaption>"
          "</figure>\n",
          escaped(picture.caption), base64(picture.webp));
  }
  return out + "</body></html>\n";
}

}  // namespace sparvar
