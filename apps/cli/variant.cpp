#include "variant.h"

#include <fmt/format.h>

#include <string_view>

#include "flags.h"
#include "plan_source.h"

namespace sparvar::cli {
namespace {

constexpr std::string_view fitted = "fastvar=";

}  // namespace

VariantSource parse_variant(const std::string& flag, const std::string& text) {
  VariantSource source{.name = text, .plan = text};
  for (std::size_t plus = source.plan.rfind('+'); plus != std::string::npos; plus = source.plan.rfind('+')) {
    const std::string part = source.plan.substr(plus + 1);
    if (part.starts_with("skip"))
      source.skip_scales = parse_number(flag, part.substr(4), Range<int>{0, 2});
    else if (part.starts_with("uncond"))
      source.uncond_until = parse_number(flag, part.substr(6), Range<int>{0, 64});
    else
      break;  // of a file's name
    source.plan.resize(plus);
  }
  if (source.plan.starts_with(fitted)) {
    source.as_many_pairs_as = source.plan.substr(fitted.size());
    source.plan = "fastvar";
    if (source.as_many_pairs_as.empty())
      throw CLI::ValidationError(flag, fmt::format("no plan behind = in '{}'", text));
    if (!names_file(source.as_many_pairs_as)) check_preset(flag, source.as_many_pairs_as);
    return source;
  }
  if (source.plan.empty()) throw CLI::ValidationError(flag, fmt::format("no plan in '{}'", text));
  if (names_file(source.plan)) return source;
  if (source.plan.find('+') != std::string::npos)
    throw CLI::ValidationError(
        flag, fmt::format("expected PLAN, PLAN+skipN, PLAN+uncondN or PLAN+skipN+uncondN, found '{}'", text));
  check_preset(flag, source.plan);
  return source;
}

AttentionPlan fitted_to(const VariantSource& source, int layers, int scales) {
  return plan_of(source.as_many_pairs_as, layers, scales);
}

void fit_pairs(Variant& variant, const GenerateResult& other) {
  if (!variant.plan.pruning) return;  // too few scales for any plan to leave something out
  const double share = pairs_computed(other, other, first_counted_scale(other.schedule));
  const double keep = keep_for_pairs(other.schedule, variant.plan.pruning->first_scale, share);
  variant.plan.pruning->keep = {keep};
  variant.plan.name = fmt::format("fastvar:{:g}", keep);
  variant.name += fmt::format(" (keeps {:g})", keep);
}

Variant load_variant(const VariantSource& source, int layers, int scales) {
  return {source.name, plan_of(source.plan, layers, scales), source.skip_scales, source.uncond_until};
}

}  // namespace sparvar::cli
