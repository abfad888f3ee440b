// The pipeline: loading, pictures, progress and previews, Ctrl-C.
#include "sparvar/pipeline.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <omp.h>

#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "bridge.h"
#include "pipeline/analyze.h"

namespace sparvar::python {
namespace {

using Pixels = nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<3>>;

/// [h, w, 3], which takes over the picture's memory.
Pixels pixels_of(Image image) {
  auto owned = std::make_unique<Image>(std::move(image));
  const std::size_t shape[] = {static_cast<std::size_t>(owned->height), static_cast<std::size_t>(owned->width), 3};
  Image* held = owned.release();
  const nb::capsule owner(held, [](void* memory) noexcept { delete static_cast<Image*>(memory); });
  return {held->rgb.data(), 3, shape, owner};
}

nb::tuple pair_of(Grid grid) { return nb::make_tuple(grid.h, grid.w); }

const char* name_of(Progress::Stage stage) {
  switch (stage) {
    case Progress::Stage::load:
      return "load";
    case Progress::Stage::text:
      return "text";
    case Progress::Stage::scale:
      return "scale";
    case Progress::Stage::decode:
      return "decode";
  }
  return "";
}

nb::dict dict_of(const ModelInfo& info) {
  nb::dict out;
  out["model_dir"] = info.model_dir;
  out["model_hash"] = info.model_hash;
  out["architecture"] = info.architecture;
  out["layers"] = info.layers;
  out["width"] = info.width;
  out["heads"] = info.heads;
  out["head_dim"] = info.head_dim;
  out["bits"] = info.bits;
  out["parameters"] = info.transformer_parameters + info.vae_parameters + info.text_parameters;
  out["schedule"] = grids_of(info.schedule);
  out["picture_height"] = info.picture_height;
  out["picture_width"] = info.picture_width;
  out["default_guidance_scale"] = info.default_cfg;
  out["default_tau"] = info.default_tau;
  out["backend"] = info.backend;
  out["weights"] = info.weights == WeightFormat::fp8 ? "fp8" : "plain";
  out["on_gpu"] = info.on_gpu;
  out["why_no_gpu"] = info.why_no_gpu;
  return out;
}

nb::dict dict_of(const GenerateResult& result) {
  nb::list scales;
  for (const ScaleTiming& scale : result.scales) {
    nb::dict one;
    one["grid"] = pair_of(scale.grid);
    one["seconds"] = scale.seconds;
    one["cold_seconds"] = scale.cold_seconds;
    one["attention_seconds"] = scale.attention_seconds;
    one["share_of_pairs"] = scale.share_of_pairs;
    scales.append(one);
  }
  nb::dict out;
  out["scales"] = scales;
  out["text_seconds"] = result.text_seconds;
  out["decode_seconds"] = result.decode_seconds;
  out["cold_decode_seconds"] = result.cold_decode_seconds;
  out["preview_seconds"] = result.preview_seconds;
  out["total_seconds"] = result.total_seconds;
  out["batches"] = result.batches;
  out["cold_batches"] = result.cold_batches;
  out["recordings"] = result.recordings;
  out["attention"] = result.attention_path;
  return out;
}

/// OpenMP's number of threads is the calling thread's: it holds for this call and is put back, PyTorch may use it too.
class Threads {
 public:
  explicit Threads(int count) : before_(omp_get_max_threads()) {
    if (count > 0) omp_set_num_threads(count);
  }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;
  ~Threads() { omp_set_num_threads(before_); }

 private:
  int before_;
};

/// A loaded model, for one thread at a time: others wait.
class Engine {
 public:
  Engine(const std::string& model_dir, const std::string& device, Precision precision, WeightFormat weights,
         int threads, const nb::object& on_progress)
      : threads_(threads) {
    Bridge bridge;
    PipelineOptions options{.model_dir = model_dir, .precision = precision, .threads = threads, .device = device};
    options.weights = weights;
    options.on_progress = [&](const Progress& at) {
      bridge.call([&] {
        if (!on_progress.is_none()) on_progress(at.bytes_done, at.bytes_total);
      });
      if (bridge.failed()) throw Error(ErrorKind::cancelled, "stopped");
    };
    try {
      const nb::gil_scoped_release released;
      const Threads set(threads);
      pipeline_ = std::make_unique<Pipeline>(Pipeline::load(options));
    } catch (const Error&) {
      if (!bridge.failed()) throw;
    }
    bridge.rethrow();
  }

  nb::dict info() const { return dict_of(pipeline_->info()); }
  AttentionPlan default_plan(int scales) const { return sparvar::default_plan(pipeline_->info(), scales); }

  nb::tuple generate(GenerateOptions options, const nb::object& on_progress, const nb::object& on_preview,
                     AttentionAnalyzer* analyzer) {
    Bridge bridge;
    options.cancel = bridge.cancel();
    if (analyzer != nullptr || !pipeline_->info().on_gpu)  // a GPU is looked after between scales
      options.on_attention = [&bridge, analyzer](int layer, int scale, const AttentionArgs& args) {
        bridge.look();
        if (analyzer != nullptr && !bridge.failed()) analyzer->observe(layer, scale, args);
      };
    options.on_progress = [&](const Progress& at) {
      bridge.call([&] {
        if (!on_progress.is_none()) on_progress(name_of(at.stage), at.done, at.total, pair_of(at.grid), at.seconds);
      });
    };
    if (!on_preview.is_none())
      options.on_preview = [&](const Picture& picture, int scale) {
        bridge.call([&] { on_preview(pixels_of(picture.image), picture.prompt_index, picture.picture_index, scale); });
      };
    GenerateResult result;
    try {
      const nb::gil_scoped_release released;
      const Turn turn(*this, bridge);
      const Threads set(threads_);
      result = pipeline_->generate(options);
    } catch (const Error&) {
      if (!bridge.failed()) throw;
    }
    bridge.rethrow();
    nb::list pictures;
    for (Picture& picture : result.pictures) pictures.append(pixels_of(std::move(picture.image)));
    return nb::make_tuple(pictures, dict_of(result));
  }

 private:
  /// While it lives this thread has the pipeline.
  class Turn {
   public:
    Turn(Engine& engine, Bridge& bridge) : engine_(engine) {
      if (engine.owner_.load() == std::this_thread::get_id())
        throw Error(ErrorKind::usage, "the pipeline was called from its own callback; it draws one run at a time");
      while (!engine.busy_.try_lock_for(std::chrono::milliseconds(100))) {
        bridge.look();
        if (bridge.failed()) throw Error(ErrorKind::cancelled, "stopped");
      }
      engine.owner_.store(std::this_thread::get_id());
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() {
      engine_.owner_.store({});
      engine_.busy_.unlock();
    }

   private:
    Engine& engine_;
  };

  int threads_;
  std::unique_ptr<Pipeline> pipeline_;
  std::timed_mutex busy_;
  std::atomic<std::thread::id> owner_{};
};

}  // namespace

void bind_pipeline(nb::module_& m) {
  nb::class_<GenerateOptions>(m, "GenerateOptions", "What is drawn, and how; see sparvar.Pipeline.__call__.")
      .def(nb::init<>())
      .def_rw("prompts", &GenerateOptions::prompts)
      .def_rw("pictures_per_prompt", &GenerateOptions::pictures_per_prompt)
      .def_rw("seed", &GenerateOptions::seed)
      .def_rw("first_picture", &GenerateOptions::first_picture)
      .def_rw("aspect", &GenerateOptions::aspect)
      .def_rw("size", &GenerateOptions::size)
      .def_rw("skip_scales", &GenerateOptions::skip_scales)
      .def_rw("uncond_until", &GenerateOptions::uncond_until)
      .def_rw("guidance_scale", &GenerateOptions::cfg)
      .def_rw("tau", &GenerateOptions::tau)
      .def_rw("top_k", &GenerateOptions::top_k)
      .def_rw("top_p", &GenerateOptions::top_p)
      .def_rw("greedy", &GenerateOptions::greedy)
      .def_rw("plan", &GenerateOptions::plan)
      .def_rw("batch", &GenerateOptions::batch)
      .def_rw("preview_from", &GenerateOptions::preview_from);
  nb::enum_<WeightFormat>(m, "WeightFormat", "How the weights of the blocks are kept and multiplied.")
      .value("plain", WeightFormat::plain)
      .value("fp8", WeightFormat::fp8)
      .value("as_stored", WeightFormat::as_stored);
  nb::class_<Engine>(m, "Engine", "A loaded model.")
      .def(
          "__init__",
          [](Engine* self, const std::string& model_dir, const std::string& device, bool bf16, WeightFormat weights,
             int threads, const nb::object& on_progress) {
            new (self)
                Engine(model_dir, device, bf16 ? Precision::bf16 : Precision::f32, weights, threads, on_progress);
          },
          nb::arg("model_dir"), nb::arg("device"), nb::arg("bf16"), nb::arg("weights"), nb::arg("threads"),
          nb::arg("on_progress").none())
      .def("info", &Engine::info)
      .def("default_plan", &Engine::default_plan, nb::arg("scales"),
           "Of a picture of so many scales where no plan is named: the model's plan.json, or a preset.")
      .def("generate", &Engine::generate, nb::arg("options"), nb::arg("on_progress").none(),
           nb::arg("on_preview").none(), nb::arg("analyzer").none() = nb::none(),
           "Returns ([uint8 (h, w, 3), ...], timings). on_progress(stage, done, total, (h, w), seconds); "
           "on_preview(pixels, prompt, picture, scale). analyzer: counts what it sees.");
}

}  // namespace sparvar::python
