#include "sparvar/convert.h"

#include <fmt/format.h>
#include <zlib.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <span>

#include "core/open_file.h"
#include "image/atomic_file.h"
#include "pipeline/convert_config.h"
#include "pipeline/convert_layout.h"
#include "pipeline/convert_state.h"
#include "pipeline/convert_writer.h"
#include "pipeline/model_files.h"
#include "weights/config.h"

namespace sparvar {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr const char* kTokenizer = "spiece.model";
constexpr std::uint64_t kMaxTokenizer = 100'000'000;

const char* name_of(ConvertType type) {
  constexpr const char* names[] = {"bf16", "f32", "int8", "fp8"};
  return names[static_cast<int>(type)];
}

std::vector<std::string> places(const std::string& key, std::vector<std::string> first) {
  if (!key.empty()) return {key};
  for (std::string& place : known_places())
    if (std::find(first.begin(), first.end(), place) == first.end()) first.push_back(std::move(place));
  return first;
}

std::string file_in(const std::string& folder, const char* name) { return (fs::path(folder) / name).string(); }

/// The three checkpoints, open and checked.
struct Inputs {
  explicit Inputs(const ConvertOptions& options)
      : transformer("transformer", options.transformer,
                    places(options.transformer_key, {"trainer.gpt_fsdp", "trainer.gpt_wo_ddp", "gpt_fsdp"})),
        vae("vae", options.vae, places(options.vae_key, {"vae", "trainer.vae_local", "trainer.vae"})),
        text("text encoder", options.text_encoder, {"model", "state_dict"}),
        tokenizer(read_text(file_in(options.text_encoder, kTokenizer), kMaxTokenizer)) {}

  ConvertSource transformer, vae, text;
  std::string tokenizer;
};

/// Names, sizes and times of the files that tensors come from: is it the same checkpoint?
Json identity(const ConvertSource& source) {
  std::set<std::string> paths;
  for (const std::string& name : source.checkpoint().names()) paths.insert(source.checkpoint().path_of(name));
  Json files = Json::array();
  std::error_code ignored;
  for (const std::string& path : paths)
    files.push_back({{"file", fs::path(path).filename().string()},
                     {"bytes", fs::file_size(path, ignored)},
                     {"time", fs::last_write_time(path, ignored).time_since_epoch().count()}});
  return {{"files", files}, {"at", source.checkpoint().place()}};
}

std::uint32_t checksum(const std::string& text) {
  return static_cast<std::uint32_t>(
      ::crc32_z(::crc32_z(0, nullptr, 0), reinterpret_cast<const Bytef*>(text.data()), text.size()));
}

/// What the folder will hold.
struct Plan {
  Json config;
  std::vector<PlannedFile> tensors;
  std::map<std::string, std::string> texts;  // indices and the tokenizer
  std::int64_t bytes = 0;
  std::vector<std::string> skipped;
};

std::string index_of(const std::vector<PlannedFile>& shards) {
  Json map = Json::object();
  std::int64_t bytes = 0;
  for (const PlannedFile& shard : shards)
    for (const PlannedTensor& tensor : shard.tensors) {
      map[tensor.name] = shard.name;
      bytes += tensor.bytes();
    }
  return Json{{"metadata", {{"total_size", bytes}}}, {"weight_map", map}}.dump(1) + "\n";
}

/// The parts that have matrices of eight bits.
ConvertType type_of(const std::string& stem, ConvertType asked) {
  const bool eight_bits = stem == "transformer" || (stem == "text_encoder" && asked == ConvertType::int8);
  return asked == ConvertType::f32 || eight_bits ? asked : ConvertType::bf16;
}

void add_part(Plan& plan, const std::string& stem, const ConvertSource& source, const std::vector<WantedTensor>& layout,
              const ConvertOptions& options) {
  std::vector<PlannedFile> files =
      plan_files(stem, source, layout, type_of(stem, options.type), std::max<std::int64_t>(options.shard_bytes, 1));
  if (files.size() > 1) plan.texts[stem + ".safetensors.index.json"] = index_of(files);
  std::set<std::string> used;
  for (const WantedTensor& tensor : layout) used.insert(tensor.name);
  for (const std::string& name : source.names())
    if (!used.contains(name)) plan.skipped.push_back(fmt::format("{}: {}", source.part(), name));
  for (PlannedFile& file : files) {
    plan.bytes += file.bytes();
    plan.tensors.push_back(std::move(file));
  }
}

Plan make_plan(const Inputs& inputs, const ConvertOptions& options) {
  Plan plan;
  plan.config =
      derive_config(inputs.transformer, inputs.vae, file_in(options.text_encoder, "config.json"), options.set);
  const ModelConfig config =
      parse_model_config(plan.config.dump(), file_in(options.output, "config.json") + " (derived)");
  add_part(plan, "transformer", inputs.transformer,
           transformer_layout(config.transformer, config.schedule.size(), inputs.transformer), options);
  add_part(plan, "vae", inputs.vae, vae_layout(config.vae, inputs.vae), options);
  add_part(plan, "text_encoder", inputs.text, text_layout(config.text_encoder, inputs.text), options);
  plan.texts[kTokenizer] = inputs.tokenizer;
  for (const auto& [name, text] : plan.texts) plan.bytes += static_cast<std::int64_t>(text.size());
  return plan;
}

class Conversion {
 public:
  Conversion(const ConvertOptions& options, const Inputs& inputs, const Plan& plan)
      : options_(options),
        plan_(plan),
        state_(options.output,
               {{"transformer", identity(inputs.transformer)},
                {"vae", identity(inputs.vae)},
                {"text_encoder", identity(inputs.text)},
                {"dtype", name_of(options.type)},
                {"shard_bytes", options.shard_bytes},
                {"config", plan.config}},
               options.resume) {}

  /// Writes what is not there, reads all of it back, and last writes config.json.
  std::vector<ConvertedFile> run() {
    total_ = 2 * plan_.bytes;  // written and read back
    reuse();
    check_space();
    for (const PlannedFile& file : plan_.tensors)
      finish(file.name, file.bytes(), static_cast<int>(file.tensors.size()),
             [&](const std::string& path) { return write_tensors(file, path, counter(file.name, false)); });
    for (const auto& [name, text] : plan_.texts)
      finish(name, static_cast<std::int64_t>(text.size()), 0,
             [&, &file = name, &bytes = text](const std::string& path) {
               write_file_atomically(path, {reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()});
               counter(file, false)(static_cast<std::int64_t>(bytes.size()));
               return checksum(bytes);
             });
    verify();
    const ModelFiles readable(options_.output);
    const std::string config = plan_.config.dump(1) + "\n";
    write_file_atomically(path_of("config.json"),
                          {reinterpret_cast<const std::uint8_t*>(config.data()), config.size()});
    files_.push_back({"config.json", static_cast<std::int64_t>(config.size()), checksum(config), 0, false});
    state_.complete();
    return std::move(files_);
  }

 private:
  std::string path_of(const std::string& name) const { return file_in(options_.output, name.c_str()); }

  PieceCounter counter(const std::string& file, bool verifying) {
    return [this, file, verifying](std::int64_t bytes) {
      done_ += bytes;
      if (options_.cancel != nullptr && options_.cancel->load())
        throw Error(ErrorKind::cancelled,
                    fmt::format("stopped; {} is not finished, --resume goes on with it", options_.output));
      if (options_.on_progress) options_.on_progress({file, verifying, done_, total_});
    };
  }

  /// Files of a conversion before this one whose checksum is still right.
  void reuse() {
    const auto check = [&](const std::string& name, std::int64_t bytes) {
      const Json* known = state_.finished(name, bytes);
      if (known == nullptr) return;
      const std::int64_t before = done_;
      if (read_back(path_of(name), counter(name, true)) == (*known)["crc32"].get<std::uint32_t>()) {
        reused_.insert(name);
        total_ -= bytes;
      } else {
        state_.forget(name);
        done_ = before;
      }
    };
    for (const PlannedFile& file : plan_.tensors) check(file.name, file.bytes());
    for (const auto& [name, text] : plan_.texts) check(name, static_cast<std::int64_t>(text.size()));
  }

  void check_space() const {
    std::int64_t needed = plan_.bytes;
    for (const PlannedFile& file : plan_.tensors)
      if (reused_.contains(file.name)) needed -= file.bytes();
    std::error_code unknown;
    const fs::space_info space = fs::space(options_.output, unknown);
    if (!unknown && static_cast<std::uintmax_t>(std::max<std::int64_t>(needed, 0)) > space.available)
      throw Error(ErrorKind::system,
                  fmt::format("{}: the model takes {:.1f} GB, but {:.1f} GB are free there", options_.output,
                              static_cast<double>(needed) / 1e9, static_cast<double>(space.available) / 1e9));
  }

  template <typename Write>
  void finish(const std::string& name, std::int64_t bytes, int tensors, Write&& write) {
    if (reused_.contains(name)) {
      files_.push_back({name, bytes, (*state_.finished(name, bytes))["crc32"].get<std::uint32_t>(), tensors, true});
      return;
    }
    const std::uint32_t crc = write(path_of(name));
    state_.finish(name, bytes, crc);
    files_.push_back({name, bytes, crc, tensors, false});
  }

  void verify() {
    for (const ConvertedFile& file : files_) {
      if (file.reused) continue;
      if (const std::uint32_t found = read_back(path_of(file.name), counter(file.name, true)); found != file.crc32)
        throw Error(ErrorKind::system,
                    fmt::format("{}: wrote the checksum {:08x}, read back {:08x}: the disk does not keep what is "
                                "written; --resume writes this file again",
                                path_of(file.name), file.crc32, found));
    }
  }

  const ConvertOptions& options_;
  const Plan& plan_;
  ConvertState state_;
  std::set<std::string> reused_;
  std::vector<ConvertedFile> files_;
  std::int64_t done_ = 0, total_ = 0;
};

void check_options(const ConvertOptions& options) {
  for (const auto& [path, what] : {std::pair<const std::string&, const char*>{options.transformer, "transformer"},
                                   {options.vae, "VAE"},
                                   {options.text_encoder, "text encoder's folder"},
                                   {options.output, "folder to write"}})
    if (path.empty()) throw Error(ErrorKind::usage, fmt::format("convert: name the {}", what));
  std::error_code ignored;
  if (!fs::is_directory(options.text_encoder, ignored))
    throw Error(ErrorKind::input, fmt::format("{}: expected the text encoder's folder (config.json, {} and a "
                                              "checkpoint), found no folder",
                                              options.text_encoder, kTokenizer));
  for (const char* name : {"config.json", kTokenizer})
    if (!fs::exists(fs::path(options.text_encoder) / name, ignored))
      throw Error(ErrorKind::input, fmt::format("{}: no {} in the text encoder's folder", options.text_encoder, name));
}

}  // namespace

ConvertResult convert_checkpoint(const ConvertOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  check_options(options);
  const Inputs inputs(options);
  const Plan plan = make_plan(inputs, options);
  ConvertResult result;
  result.folder = options.output;
  result.config = plan.config.dump(1);
  result.skipped = plan.skipped;
  for (const ConvertSource* source : {&inputs.transformer, &inputs.vae, &inputs.text})
    if (const std::string place = source->checkpoint().place(); !place.empty())
      result.places.push_back(fmt::format("{}: at '{}' of {}", source->part(), place, source->checkpoint().path()));
  result.files = Conversion(options, inputs, plan).run();
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace sparvar
