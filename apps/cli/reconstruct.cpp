// sparvar reconstruct: what the image tokenizer keeps of a picture.
#include "visual/reconstruct.h"

#include <fmt/format.h>

#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "common_flags.h"
#include "console.h"
#include "flags.h"
#include "image/atomic_file.h"
#include "image/resize.h"
#include "output_file.h"
#include "pipeline/image_tokenizer.h"
#include "report.h"
#include "weights/npz.h"

namespace sparvar::cli {
namespace {

struct Settings {
  std::vector<std::string> inputs;
  std::string output, bits;
  PipelineOptions pipeline;
  int skip_scales = 0;
  bool json = false;
  bool quiet = false;
};

struct Result {
  Image given, fitted;
  Reconstruction made;
  double psnr = 0, ssim = 0;
};

void write_bits(const std::string& path, const Result& result, const ScaleSchedule& grids) {
  std::vector<std::pair<std::string, Tensor>> arrays;
  Tensor schedule = Tensor::empty(DType::i64, {static_cast<std::int64_t>(grids.size()), 2});
  for (std::size_t k = 0; k < grids.size(); ++k) {
    schedule.data<std::int64_t>()[2 * k] = grids[k].h;
    schedule.data<std::int64_t>()[2 * k + 1] = grids[k].w;
  }
  arrays.emplace_back("scales", schedule);
  for (std::size_t k = 0; k < grids.size(); ++k) {
    const Tensor& bits = result.made.quantized.bits[k];
    arrays.emplace_back(fmt::format("bits.s{}", k), bits.reshaped({bits.dim(1), bits.dim(2), bits.dim(3)}));
  }
  write_file_atomically(path, npz_bytes(arrays));
}

std::string fitting(const Result& result) {
  const Image& from = result.given;
  const Image& to = result.fitted;
  if (from.width == to.width && from.height == to.height) return "as it is";
  const bool cut =
      static_cast<std::int64_t>(from.width) * to.height != static_cast<std::int64_t>(to.width) * from.height;
  return fmt::format("{}resized (Lanczos) to {}x{}", cut ? "cut to the middle of the right shape, " : "", to.width,
                     to.height);
}

std::int64_t bits_in(const Result& result, int skip) {
  std::int64_t sum = 0;
  const std::vector<Tensor>& bits = result.made.quantized.bits;
  for (std::size_t k = 0; k + static_cast<std::size_t>(skip) < bits.size(); ++k) sum += bits[k].size();
  return sum;
}

void report(const Settings& settings, const ImageTokenizer& tokenizer, const Result& result) {
  const int scales = static_cast<int>(tokenizer.grids.size());
  const std::int64_t bits = bits_in(result, settings.skip_scales);
  const double per_pixel = static_cast<double>(bits) / (static_cast<double>(tokenizer.width) * tokenizer.height);
  const Reconstruction& made = result.made;
  if (settings.json) {
    print(dump({{"picture", settings.output},
                {"input", settings.inputs.front()},
                {"input_width", result.given.width},
                {"input_height", result.given.height},
                {"width", tokenizer.width},
                {"height", tokenizer.height},
                {"fitting", fitting(result)},
                {"scales", scales},
                {"skipped_scales", settings.skip_scales},
                {"bits", bits},
                {"bits_per_pixel", per_pixel},
                {"psnr", std::isinf(result.psnr) ? nlohmann::ordered_json() : nlohmann::ordered_json(result.psnr)},
                {"ssim", result.ssim},
                {"encode_seconds", made.encode_seconds},
                {"quantize_seconds", made.quantize_seconds},
                {"decode_seconds", made.decode_seconds},
                {"bits_file", settings.bits},
                {"dtype", name_of(settings.pipeline.precision)},
                {"model", tokenizer.dir},
                {"backend", tokenizer.device.backend->describe()}}));
  } else if (!settings.quiet) {
    std::string out = fmt::format("{}\ninput    {}x{}, {}\n", settings.output, result.given.width, result.given.height,
                                  fitting(result));
    out += fmt::format("scales   {} of {}: {} bits, {:.3f} a pixel\n", scales - settings.skip_scales, scales, bits,
                       per_pixel);
    out += fmt::format("PSNR     {:.2f} dB\nSSIM     {:.4f}\n", result.psnr, result.ssim);
    out += fmt::format("encode   {:.3f} s, quantise {:.3f} s, decode {:.3f} s\n", made.encode_seconds,
                       made.quantize_seconds, made.decode_seconds);
    if (!settings.bits.empty()) out += fmt::format("{}: the bits of all scales\n", settings.bits);
    print(out);
  }
}

void run(const Settings& settings) {
  if (settings.inputs.size() != 1)
    throw Error(ErrorKind::usage,
                fmt::format("reconstruct: one picture is needed, {} were given", settings.inputs.size()));
  if (settings.output.empty()) throw Error(ErrorKind::usage, "reconstruct: say where the picture goes, -o FILE.png");
  check_output_file("-o", settings.output, ".png", settings.inputs);
  check_output_file("--bits", settings.bits, ".npz", settings.inputs);
  Result result;
  result.given = read_image(settings.inputs.front());
  ImageTokenizer tokenizer = ImageTokenizer::load(settings.pipeline);
  if (!tokenizer.vae->can_encode())
    throw Error(
        ErrorKind::input,
        fmt::format("{}: the VAE of this model holds no encoder (no tensor encoder.conv_in.conv.weight): it can "
                    "draw pictures, but read none; name another model with --model",
                    tokenizer.dir));
  result.fitted = cover(result.given, tokenizer.width, tokenizer.height);
  result.made =
      reconstruct(*tokenizer.vae, *tokenizer.device.backend, result.fitted, tokenizer.grids, settings.skip_scales);
  result.psnr = psnr(result.fitted, result.made.picture);
  result.ssim = ssim(result.fitted, result.made.picture);
  write_png(settings.output, result.made.picture,
            {{"Software", "sparvar " SPARVAR_VERSION}, {"skipped_scales", std::to_string(settings.skip_scales)}});
  if (!settings.bits.empty()) write_bits(settings.bits, result, tokenizer.grids);
  report(settings, tokenizer, result);
}

}  // namespace

void add_reconstruct(CLI::App& program, Action& chosen) {
  CLI::App* command =
      program.add_subcommand("reconstruct", "Sends a picture through the image tokenizer and back: what its bits keep");
  command->allow_extras();
  const auto settings = std::make_shared<Settings>();
  command->add_option("picture", settings->inputs, "The picture; its middle, resized to the model's size, is used")
      ->expected(CLI::detail::expected_max_vector_size, CLI::detail::expected_max_vector_size)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false)
      ->option_text("PICTURE");
  command->add_option("-o,--output", settings->output, "The picture that comes back")->type_name("FILE.png");
  add_number(*command, "--skip-scales", settings->skip_scales, Range<int>{0, 63},
             "Leave out the codes of the last N scales (0)");
  command->add_option("--bits", settings->bits, "Write the bits of every scale for numpy.load, [h, w, bits] each")
      ->type_name("FILE.npz");
  add_device(*command, settings->pipeline);
  add_precision(*command, settings->pipeline);
  add_engine(*command, settings->pipeline);
  command->add_flag("--json", settings->json, "One JSON object on standard output");
  command->add_flag("--quiet", settings->quiet, "No report");
  command->callback([settings, &chosen] { chosen = [settings] { run(*settings); }; });
}

}  // namespace sparvar::cli
