// sparvar generate: prompts in, PNG files out.
#include <algorithm>
#include <chrono>
#include <limits>
#include <memory>

#include "commands.h"
#include "console.h"
#include "device_flag.h"
#include "flags.h"
#include "interrupt.h"
#include "output.h"
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
  std::string attention;  // empty: sparvar on the CPU, dense on a GPU
  std::string plan_file;
  std::string output = ".";
  PipelineOptions pipeline;
  GenerateOptions generate;
  bool json = false;
  bool quiet = false;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void check_attention_name(const std::string& name) {
  const std::vector<std::string> names = AttentionPlan::preset_names();
  if (std::find(names.begin(), names.end(), name) != names.end()) return;
  throw CLI::ValidationError("--attention", fmt::format("there is no plan '{}'{} (plans: {})", name,
                                                        did_you_mean(name, names), fmt::join(names, ", ")));
}

void declare_sampling(CLI::App& command, GenerateOptions& options) {
  add_number(command, "-n", options.pictures_per_prompt, Range<int>{1, most_pictures}, "Pictures for each prompt (1)");
  add_number(command, "--seed", options.seed, Range<std::uint64_t>{0, std::numeric_limits<std::uint64_t>::max()},
             "Seed of the random numbers; the same seed gives the same pictures (0)");
  add_number_list(command, "--cfg", options.cfg, {0.0F, 10000.0F},
                  "Guidance, one value or one per scale; 1: none (the model's)");
  add_number_list(command, "--tau", options.tau, {1e-4F, 10000.0F},
                  "Temperature, one value or one per scale (the model's)");
  add_number(command, "--top-k", options.top_k, Range<int>{0, std::numeric_limits<int>::max()},
             "1: the likelier value of every bit; other values change nothing, bits have two (0)");
  add_number(command, "--top-p", options.top_p, Range<float>{0.0F, 1.0F},
             "A bit whose rarer value has a probability of at most 1 - P takes the other; 0: off (0.97)");
  command.add_flag("--greedy", options.greedy, "The likelier value of every bit: no random numbers");
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
  auto* attention = command.add_option_function<std::string>(
      "--attention",
      [&settings](const std::string& name) {
        check_attention_name(name);
        settings.attention = name;
      },
      fmt::format("Attention plan: {} (sparvar on the CPU, dense on a GPU)",
                  fmt::join(AttentionPlan::preset_names(), ", ")));
  attention->type_name("NAME");
  command.add_option("--plan", settings.plan_file, "Attention plan from a JSON file")
      ->type_name("FILE")
      ->excludes(attention);
  add_device(command, settings.pipeline);
  add_precision(command, settings.pipeline);
  add_number(command, "--threads", settings.pipeline.threads, Range<int>{1, 1024}, "Threads (all cores)");
  command.add_option("--model", settings.pipeline.model_dir, "Folder of the model (the bundled one)")->type_name("DIR");
  add_number(command, "--batch", settings.generate.batch, Range<int>{1, 1024},
             "Pictures drawn together (as many as need little memory)");
  command.add_option("-o,--output", settings.output, "FILE.png for one picture, else an existing folder (.)")
      ->type_name("PATH");
  command.add_flag("--json", settings.json, "One JSON object on standard output");
  command.add_flag("--quiet", settings.quiet, "No progress and no summary");
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

void write_pictures(Run& run, const Output& output) {
  for (const Picture& picture : run.result.pictures) {
    stop_if_interrupted();
    const std::string path = output.path(picture.prompt, picture.prompt_index, picture.picture_index);
    write_png(path, picture.image, picture_metadata(run, picture));
    run.paths.push_back(path);
  }
}

void generate(Settings& settings) {
  GenerateOptions& options = settings.generate;
  options.cancel = catch_interrupts();
  options.prompts = collect_prompts(settings);
  const Output output(settings.output, static_cast<int>(options.prompts.size()), options.pictures_per_prompt,
                      {settings.prompt_file, settings.plan_file});
  const bool chooses = settings.plan_file.empty() ? !settings.attention.empty() && settings.attention != "dense" &&
                                                        !AttentionPlan::preset(settings.attention, 1, 13).is_static()
                                                  : !AttentionPlan::from_file(settings.plan_file).is_static();
  if (chooses && settings.pipeline.device == "auto") settings.pipeline.device = "cpu";  // the one that can

  ProgressDisplay display(settings.quiet);
  const auto start = std::chrono::steady_clock::now();
  Pipeline pipeline = Pipeline::load(settings.pipeline);
  const double load_seconds = seconds_since(start);
  stop_if_interrupted();

  const ModelInfo& model = pipeline.info();
  if (settings.plan_file.empty()) {
    const std::string name = !settings.attention.empty() ? settings.attention : model.on_gpu ? "dense" : "sparvar";
    options.plan = AttentionPlan::preset(name, model.layers, static_cast<int>(model.schedule.size()));
  }
  options.on_progress = [&display](const Progress& progress) { display.show(progress); };
  const GenerateResult result = pipeline.generate(options);
  display.clear();

  Run run{model, options, result, {}, settings.pipeline.precision, load_seconds};
  write_pictures(run, output);
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
  declare_rest(*command, *settings);
  command->callback([settings, &chosen] { chosen = [settings] { generate(*settings); }; });
}

}  // namespace sparvar::cli
