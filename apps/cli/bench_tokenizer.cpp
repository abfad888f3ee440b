// sparvar bench tokenizer: the image tokenizer alone, both ways.
#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "bench_grid.h"
#include "commands.h"
#include "console.h"
#include "pipeline/image_tokenizer.h"
#include "report.h"
#include "visual/reconstruct.h"

namespace sparvar::cli {
namespace {

struct Settings {
  std::string model;
  BenchGrid grid;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// Any picture will do: the work does not depend on what it shows.
Image waves(int width, int height) {
  Image image{width, height, {}};
  for (int y = 0; y < height; ++y)
    for (int x = 0; x < width; ++x)
      for (int c = 0; c < 3; ++c) image.rgb.push_back(static_cast<std::uint8_t>(x * y / (9 + c) + 40 * c));
  return image;
}

void bench(const Settings& settings) {
  BenchTable table("The image tokenizer alone: medians of warm runs");
  for (const Precision precision : settings.grid.precisions)
    for (const int threads : threads_of(settings.grid)) {
      const std::string command = fmt::format("sparvar bench tokenizer{} --dtype {} --threads {} -r {}",
                                              settings.model.empty() ? "" : " --model " + settings.model,
                                              name_of(precision), threads, settings.grid.repeat);
      tell(settings.grid, command);
      ImageTokenizer tokenizer = ImageTokenizer::load({settings.model, precision, threads, "cpu"});
      if (!tokenizer.vae->can_encode())
        throw Error(ErrorKind::input, fmt::format("{}: the VAE of this model holds no encoder: bench model times its "
                                                  "decoder",
                                                  tokenizer.dir));
      const Image picture = waves(tokenizer.width, tokenizer.height);
      std::vector<double> encode, quantize, decode;
      for (int r = 0; r <= settings.grid.repeat; ++r) {
        const Reconstruction made = reconstruct(*tokenizer.vae, *tokenizer.device.backend, picture, tokenizer.grids, 0);
        if (r == 0) continue;  // a warm-up
        encode.push_back(made.encode_seconds);
        quantize.push_back(made.quantize_seconds);
        decode.push_back(made.decode_seconds);
      }
      table.add({{"width", tokenizer.width},
                 {"height", tokenizer.height},
                 {"dtype", name_of(precision)},
                 {"threads", threads},
                 {"encode_s", median(encode)},
                 {"quantise_s", median(quantize)},
                 {"decode_s", median(decode)},
                 {"backend", tokenizer.device.backend->describe()},
                 {"command", command}});
    }
  print(table.to_string(settings.grid.format));
}

}  // namespace

void add_bench_tokenizer(CLI::App& group, Action& chosen) {
  CLI::App* command = group.add_subcommand("tokenizer", "Times the image tokenizer: encoder, quantiser and decoder");
  command->allow_extras();
  const auto settings = std::make_shared<Settings>();
  command->add_option("--model", settings->model, "Folder of the model (the bundled one)")->type_name("DIR");
  add_bench_grid(*command, settings->grid);
  command->callback([settings, &chosen] { chosen = [settings] { bench(*settings); }; });
}

}  // namespace sparvar::cli
