// sparvar generate: prompts in, picture files out.
#include <algorithm>
#include <filesystem>
#include <limits>
#include <memory>
#include <optional>

#include "commands.h"
#include "common_flags.h"
#include "console.h"
#include "core/clock.h"
#include "flags.h"
#include "image/contact_sheet.h"
#include "interrupt.h"
#include "output.h"
#include "plan_source.h"
#include "progress.h"
#include "prompts.h"
#include "report.h"
#include "suggest.h"

namespace sparvar::cli {
namespace {

constexpr int most_pictures = 1024;  // of one run: they are held until the last is drawn

/// The command line as it was given.
struct Settings {
  std::vector<std::string> prompts;
  std::string prompt_file;
  PlanSource plan;  // neither preset nor file: default_plan
  std::string output = ".";
  std::string preview_dir;
  std::string sheet;  // --grid
  std::optional<ImageFormat> format;
  std::optional<int> quality;
  std::optional<std::int64_t> max_memory;  // bytes
  bool precision_given = false;
  std::string model_hash;  // known once it is loaded
  PipelineOptions pipeline;
  GenerateOptions generate;
  bool json = false;
  bool quiet = false;
};

void declare_sampling(CLI::App& command, GenerateOptions& options) {
  add_number(command, "-n", options.pictures_per_prompt, Range<int>{1, most_pictures}, "Pictures for each prompt (1)");
  add_seed(command, options.seed, "Seed of the random numbers; the same seed gives the same pictures (0)");
  add_number(command, "--first-picture", options.first_picture,
             Range<std::uint64_t>{0, std::numeric_limits<std::uint64_t>::max()},
             "Number of the first picture: draws picture N of a larger run alone (0)");
  add_guidance(command, options);
  add_number(command, "--top-k", options.top_k, Range<int>{0, std::numeric_limits<int>::max()},
             "1: the likelier value of every bit; other values change nothing, bits have two (0)");
  add_number(command, "--top-p", options.top_p, Range<float>{0.0F, 1.0F},
             "A bit whose rarer value has a probability of at most 1 - P takes the other; 0: off (0.97)");
  command.add_flag("--greedy", options.greedy, "The likelier value of every bit: no random numbers");
}

ImageFormat parse_format(const std::string& name) {
  for (const ImageFormat format : {ImageFormat::png, ImageFormat::jpeg, ImageFormat::webp})
    if (name == name_of(format)) return format;
  if (name == "jpg") return ImageFormat::jpeg;
  throw CLI::ValidationError("--format", fmt::format("expected png, jpeg or webp, found '{}'", name));
}

void declare_shape(CLI::App& command, GenerateOptions& options) {
  command
      .add_option("--aspect", options.aspect,
                  "Width to height: 1:1, 4:5, 3:4, 2:3, 4:7 (9:16), 1:2, 2:5, 1:3 or the other way round (the model's)")
      ->type_name("W:H");
  command.add_option("--size", options.size, "Size of the schedule: 0.06M, 0.25M, 0.60M, 1M (the model's)")
      ->type_name("SIZE");
  add_number(command, "--skip-scales", options.skip_scales, Range<int>{0, 2},
             "Leave out the last scales; what there is so far is decoded at full size (0)");
  add_number(command, "--uncond-until", options.uncond_until, Range<int>{0, 64},
             "Guidance ends at scale N: from it on only the prompt's half is computed (all scales)");
}

void declare_files(CLI::App& command, Settings& settings) {
  command
      .add_option("-o,--output", settings.output,
                  "FILE.png, .jpg or .webp for one picture, else an existing folder (.)")
      ->type_name("PATH");
  command
      .add_option_function<std::string>(
          "--format", [&settings](const std::string& name) { settings.format = parse_format(name); },
          "png, jpeg or webp (by the extension of -o, else png)")
      ->type_name("NAME");
  command
      .add_option_function<std::string>(
          "--quality",
          [&settings](const std::string& text) {
            settings.quality = parse_number("--quality", text, Range<int>{1, 100});
          },
          fmt::format("1 to 100, of JPEG and WebP; 100 is lossless in WebP ({})", kDefaultQuality))
      ->type_name("N");
  command
      .add_option("--preview", settings.preview_dir,
                  "Existing folder for the pictures of the scales so far, from the fourth scale on")
      ->type_name("DIR");
  command.add_option("--grid", settings.sheet, "Contact sheet of all pictures: one row per prompt")->type_name("FILE");
  command.add_flag("--json", settings.json, "One JSON object on standard output");
  command.add_flag("--quiet", settings.quiet, "No progress and no summary");
}

void declare_rest(CLI::App& command, Settings& settings) {
  // Any text is a prompt: without this CLI11 would take a bracketed one, "[a, b]", for a list.
  command.add_option("prompts", settings.prompts, "What to draw")
      ->expected(CLI::detail::expected_max_vector_size, CLI::detail::expected_max_vector_size)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false)
      ->option_text("PROMPT ...");
  command.add_option("-f,--file", settings.prompt_file, "File of prompts, one a line; - is standard input")
      ->type_name("FILE");
  add_plan_source(command, settings.plan, "plan.json of the model, else sparvar on the CPU, dense on a GPU");
  add_device(command, settings.pipeline);
  add_precision(command, settings.pipeline);
  add_weights(command, settings.pipeline);
  add_engine(command, settings.pipeline);
  add_number(command, "--batch", settings.generate.batch, Range<int>{1, 1024},
             "Pictures drawn together (as many as need little memory)");
  command
      .add_option_function<std::string>(
          "--max-memory",
          [&settings](const std::string& text) { settings.max_memory = parse_bytes("--max-memory", text); },
          "Chooses --batch and, where it is not given, --dtype to stay below, e.g. 2G; runs on the CPU")
      ->type_name("SIZE");
}

/// All prompts of the command line, then those of the file; throws where there are none or too many.
std::vector<std::string> collect_prompts(const Settings& settings) {
  std::vector<std::string> prompts = settings.prompts;
  if (!settings.prompt_file.empty()) {
    const std::vector<std::string> more = read_prompts(settings.prompt_file);
    prompts.insert(prompts.end(), more.begin(), more.end());
  }
  if (prompts.empty())
    throw Error(ErrorKind::usage, "nothing to draw: give a prompt, or a file of prompts with --file");
  const std::size_t pictures = prompts.size() * static_cast<std::size_t>(settings.generate.pictures_per_prompt);
  if (pictures > most_pictures) {
    throw Error(ErrorKind::usage,
                fmt::format("{} prompts with -n {} are {} pictures; one run draws at most {}", prompts.size(),
                            settings.generate.pictures_per_prompt, pictures, most_pictures));
  }
  return prompts;
}

void write_pictures(Run& run, const Output& output, int quality) {
  for (const Picture& picture : run.result.pictures) {
    stop_if_interrupted();
    const std::string path = output.path(picture.prompt, picture.prompt_index, picture.picture_index);
    write_image(path, picture.image, output.format(), picture_metadata(run, picture), quality);
    run.paths.push_back(path);
  }
}

void write_sheet(const Run& run, const std::string& path, int columns, int quality) {
  std::vector<const Image*> images;
  for (const Picture& picture : run.result.pictures) images.push_back(&picture.image);
  write_image(path, contact_sheet(images, columns), format_of(path), {{"Software", "sparvar " SPARVAR_VERSION}},
              quality);
}

/// What is impossible whatever the model is.
Output checked_output(const Settings& settings) {
  const GenerateOptions& options = settings.generate;
  Output output(settings.output, settings.format, static_cast<int>(options.prompts.size()), options.pictures_per_prompt,
                {settings.prompt_file, settings.plan.file});
  if (settings.quality && output.format() == ImageFormat::png && settings.sheet.empty())
    throw Error(ErrorKind::usage, "--quality is of JPEG and WebP; PNG is lossless, leave it out or take --format");
  if (!settings.preview_dir.empty()) require_writable_folder(settings.preview_dir, "--preview");
  if (!settings.sheet.empty()) {
    format_of(settings.sheet);
    const std::string folder = std::filesystem::path(settings.sheet).parent_path().string();
    require_writable_folder(folder.empty() ? "." : folder, "--grid");
  }
  return output;
}

/// Chooses the attention plan, and where --max-memory says so --batch and --dtype; tells what the CPU will need.
MemoryPlan prepare(Settings& settings, const ModelInfo& model) {
  GenerateOptions& options = settings.generate;
  const auto scales = static_cast<int>(picture_schedule(model.model_dir, options.aspect, options.size).size());
  options.plan = settings.plan.named() ? load_plan(settings.plan, model.layers, scales) : default_plan(model, scales);
  if (model.on_gpu) return {};
  const MemoryPlan plan = settings.max_memory
                              ? fit_memory(settings.pipeline, options, *settings.max_memory, !settings.precision_given)
                              : plan_memory(settings.pipeline, options);
  if (!settings.quiet) print_aside(memory_line(plan));
  return plan;
}

/// The plan as far as it is known before a model is loaded: what a preset is at each layer and scale may differ.
AttentionPlan outlined_plan(const Settings& settings) {
  if (settings.plan.named()) return load_plan(settings.plan, 1, 13);
  const GenerateOptions& options = settings.generate;
  const std::string& dir = settings.pipeline.model_dir;
  const ScaleSchedule schedule = picture_schedule(dir, options.aspect, options.size);
  return default_plan(model_outline(dir), static_cast<int>(schedule.size()));
}

void draw_previews(Settings& settings, const Output& output) {
  if (settings.preview_dir.empty()) return;
  settings.generate.on_preview = [&settings, &output](const Picture& picture, int scale) {
    const std::string path =
        output.preview_path(settings.preview_dir, picture.prompt, picture.prompt_index, picture.picture_index, scale);
    const ImageMetadata texts = {{"Software", "sparvar " SPARVAR_VERSION},
                                 {"prompt", picture.prompt},
                                 {"seed", std::to_string(settings.generate.seed)},
                                 {"model_hash", settings.model_hash},
                                 {"preview", fmt::format("scales 0 to {}", scale)}};
    write_image(path, picture.image, output.format(), texts, settings.quality.value_or(kDefaultQuality));
  };
}

void generate(Settings& settings) {
  GenerateOptions& options = settings.generate;
  options.cancel = catch_interrupts();
  options.prompts = collect_prompts(settings);
  const Output output = checked_output(settings);
  choose_device(settings.pipeline, {outlined_plan(settings)});  // what is wrong with it is said before a model loads
  if (settings.max_memory && settings.pipeline.device == "auto") settings.pipeline.device = "cpu";  // the one that can
  if (settings.max_memory && settings.pipeline.device != "cpu")
    throw Error(ErrorKind::usage,
                "--max-memory plans the CPU's memory; take --device cpu, or leave it out: a GPU's is "
                "planned from what is free");
  draw_previews(settings, output);
  MemoryPlan memory;
  if (settings.pipeline.device == "cpu")
    memory = prepare(settings, model_outline(settings.pipeline.model_dir));
  else
    plan_memory(settings.pipeline, options);  // what the model cannot do is said before it is loaded

  ProgressDisplay display(settings.quiet);
  settings.pipeline.on_progress =
      options.on_progress = [&display](const Progress& progress) { display.show(progress); };
  const auto start = Clock::now();
  Pipeline pipeline = Pipeline::load(settings.pipeline);
  const double load_seconds = seconds_since(start);
  stop_if_interrupted();

  const ModelInfo& model = pipeline.info();
  settings.model_hash = model.model_hash;
  if (memory.peak == 0) {  // which device it is was found out while loading
    display.clear();
    memory = prepare(settings, model);
  }
  const GenerateResult result = pipeline.generate(options);
  display.clear();

  Run run{model, options, result, memory, {}, settings.pipeline.precision, model.weights, load_seconds};
  const int quality = settings.quality.value_or(kDefaultQuality);
  write_pictures(run, output, quality);
  if (!settings.sheet.empty()) {
    const bool row_per_prompt = options.prompts.size() > 1 && options.pictures_per_prompt > 1;
    write_sheet(run, settings.sheet, row_per_prompt ? options.pictures_per_prompt : 0, quality);
  }
  if (settings.json) {
    print(json_report(run));
  } else if (!settings.quiet) {
    print(text_report(run));
  }
}

}  // namespace

void add_generate(CLI::App& program, Action& chosen) {
  CLI::App* command = program.add_subcommand("generate", "Draws pictures from prompts");
  command->allow_extras();  // refuse_unknown names them, with the nearest flag
  const auto settings = std::make_shared<Settings>();
  declare_sampling(*command, settings->generate);
  declare_shape(*command, settings->generate);
  declare_rest(*command, *settings);
  declare_files(*command, *settings);
  command->callback([settings, command, &chosen] {
    settings->precision_given = command->count("--dtype") > 0;
    chosen = [settings] { generate(*settings); };
  });
}

}  // namespace sparvar::cli
