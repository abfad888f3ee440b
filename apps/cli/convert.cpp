// sparvar convert: upstream's checkpoints into a model folder.
#include "sparvar/convert.h"

#include <fmt/format.h>

#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "console.h"
#include "flags.h"
#include "interrupt.h"
#include "progress.h"
#include "report.h"

namespace sparvar::cli {
namespace {

struct Settings {
  ConvertOptions options;
  std::vector<std::string> inputs;
  bool json = false;
  bool quiet = false;
};

std::string checksum_text(std::uint32_t crc32) { return fmt::format("{:08x}", crc32); }

/// "vae: quantize.lfq.mask" of many: one line for each first word of the names.
std::map<std::string, std::vector<std::string>> grouped(const std::vector<std::string>& skipped) {
  std::map<std::string, std::vector<std::string>> groups;
  for (const std::string& name : skipped) groups[name.substr(0, name.find('.'))].push_back(name);
  return groups;
}

void report(const Settings& settings, const ConvertResult& result) {
  std::int64_t bytes = 0;
  for (const ConvertedFile& file : result.files) bytes += file.bytes;
  if (settings.json) {
    nlohmann::ordered_json files = nlohmann::ordered_json::array();
    for (const ConvertedFile& file : result.files)
      files.push_back({{"name", file.name},
                       {"bytes", file.bytes},
                       {"crc32", checksum_text(file.crc32)},
                       {"tensors", file.tensors},
                       {"reused", file.reused}});
    return print(dump({{"model", result.folder},
                       {"bytes", bytes},
                       {"seconds", result.seconds},
                       {"files", files},
                       {"found_at", result.places},
                       {"skipped", result.skipped},
                       {"config", nlohmann::ordered_json::parse(result.config)}}));
  }
  if (settings.quiet) return;
  std::string out =
      fmt::format("{}: {} in {:.1f} s, read back and found right\n", result.folder, bytes_text(bytes), result.seconds);
  for (const ConvertedFile& file : result.files)
    out += fmt::format("  {:<40} {:>10}  crc32 {}{}\n", file.name, bytes_text(file.bytes), checksum_text(file.crc32),
                       file.reused ? "  (was there)" : "");
  for (const std::string& place : result.places) out += fmt::format("found    {}\n", place);
  for (const auto& [group, names] : grouped(result.skipped))
    out += names.size() == 1 ? fmt::format("skipped  {}\n", names.front())
                             : fmt::format("skipped  {}.*: {} tensors\n", group, names.size());
  print(out + fmt::format("next     sparvar generate \"a red apple\" --model {}\n", shell_word(result.folder)));
}

void run(Settings settings) {
  ConvertOptions& options = settings.options;
  if (settings.inputs.size() != 3)
    throw Error(ErrorKind::usage,
                fmt::format("convert: three inputs are needed, TRANSFORMER VAE TEXT_FOLDER; {} were given",
                            settings.inputs.size()));
  if (options.output.empty()) throw Error(ErrorKind::usage, "convert: say where the model goes, -o models/NAME");
  options.transformer = settings.inputs[0];
  options.vae = settings.inputs[1];
  options.text_encoder = settings.inputs[2];
  options.cancel = catch_interrupts();
  BytesDisplay display(settings.quiet);
  options.on_progress = [&display](const ConvertProgress& progress) {
    display.show(progress.bytes_done, progress.bytes_total,
                 (progress.verifying ? "checking " : "writing ") + progress.file);
  };
  const ConvertResult result = convert_checkpoint(options);
  display.clear();
  report(settings, result);
}

}  // namespace

void add_convert(CLI::App& program, Action& chosen) {
  CLI::App* command = program.add_subcommand("convert", "Turns upstream's checkpoints into a model folder");
  command->allow_extras();
  const auto settings = std::make_shared<Settings>();
  ConvertOptions& options = settings->options;
  command
      ->add_option(
          "inputs", settings->inputs,
          "Infinity's transformer and BSQ-VAE (.pth, .safetensors, an index of shards or a folder), and the folder "
          "of the T5 encoder with config.json and spiece.model")
      ->expected(CLI::detail::expected_max_vector_size, CLI::detail::expected_max_vector_size)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false)
      ->option_text("TRANSFORMER VAE TEXT_FOLDER");
  command->add_option("-o,--output", options.output, "The model folder")->type_name("DIR");
  command
      ->add_option_function<std::string>(
          "--dtype",
          [&options](const std::string& name) {
            if (name == "bf16")
              options.type = ConvertType::bf16;
            else if (name == "f32")
              options.type = ConvertType::f32;
            else if (name == "int8")
              options.type = ConvertType::int8;
            else if (name == "fp8")
              options.type = ConvertType::fp8;
            else
              throw CLI::ValidationError("--dtype", fmt::format("expected bf16, f32, int8 or fp8, found '{}'", name));
          },
          "What matrices are kept as; int8: with a scale for each output, the VAE in bf16; fp8: the transformer's "
          "linear "
          "layers as --weights fp8 makes them, all else in bf16 (bf16)")
      ->type_name("bf16|f32|int8|fp8");
  command
      ->add_option("--set", options.set,
                   "A value of config.json that shapes do not tell or that is not the released models', e.g. "
                   "transformer.num_heads=16; may be repeated")
      ->type_name("KEY=VALUE")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->expected(1)
      ->allow_extra_args(false);
  command
      ->add_option("--transformer-key", options.transformer_key,
                   "Where the transformer's state dict is in its file (looked for, as in trainer.gpt_fsdp)")
      ->type_name("KEY");
  command->add_option("--vae-key", options.vae_key, "The same for the VAE, e.g. ema (looked for, as in vae)")
      ->type_name("KEY");
  command
      ->add_option_function<std::string>(
          "--shard-size",
          [&options](const std::string& text) { options.shard_bytes = parse_bytes("--shard-size", text); },
          "Larger files are cut into shards (4G)")
      ->type_name("SIZE");
  command->add_flag("--resume", options.resume, "Go on with a conversion into this folder that was stopped");
  command->add_flag("--json", settings->json, "One JSON object on standard output");
  command->add_flag("--quiet", settings->quiet, "No progress and no report");
  command->callback([settings, &chosen] { chosen = [settings] { run(*settings); }; });
}

}  // namespace sparvar::cli
