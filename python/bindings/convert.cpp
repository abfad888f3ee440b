// Upstream's checkpoints into a model folder: progress, Ctrl-C.
#include "sparvar/convert.h"

#include "bridge.h"

namespace sparvar::python {
namespace {

nb::list list_of(const std::vector<ConvertedFile>& files) {
  nb::list out;
  for (const ConvertedFile& file : files) {
    nb::dict one;
    one["name"] = file.name;
    one["bytes"] = file.bytes;
    one["crc32"] = file.crc32;
    one["tensors"] = file.tensors;
    one["reused"] = file.reused;
    out.append(one);
  }
  return out;
}

nb::dict dict_of(const ConvertResult& result) {
  nb::dict out;
  out["model"] = result.folder;
  out["seconds"] = result.seconds;
  out["files"] = list_of(result.files);
  out["found_at"] = result.places;
  out["skipped"] = result.skipped;
  out["config"] = result.config;
  return out;
}

nb::dict convert(ConvertOptions options, const nb::object& on_progress) {
  Bridge bridge;
  options.cancel = bridge.cancel();
  options.on_progress = [&](const ConvertProgress& at) {
    bridge.call([&] {
      if (!on_progress.is_none()) on_progress(at.file, at.verifying, at.bytes_done, at.bytes_total);
    });
  };
  ConvertResult result;
  try {
    const nb::gil_scoped_release released;
    result = convert_checkpoint(options);
  } catch (const Error&) {
    if (!bridge.failed()) throw;
  }
  bridge.rethrow();
  return dict_of(result);
}

}  // namespace

void bind_convert(nb::module_& m) {
  nb::enum_<ConvertType>(m, "ConvertType", "What matrices are kept as.")
      .value("bf16", ConvertType::bf16)
      .value("f32", ConvertType::f32)
      .value("int8", ConvertType::int8)
      .value("fp8", ConvertType::fp8);
  nb::class_<ConvertOptions>(m, "ConvertOptions", "What is converted, and how; see sparvar.convert.")
      .def(nb::init<>())
      .def_rw("transformer", &ConvertOptions::transformer)
      .def_rw("vae", &ConvertOptions::vae)
      .def_rw("text_encoder", &ConvertOptions::text_encoder)
      .def_rw("output", &ConvertOptions::output)
      .def_rw("type", &ConvertOptions::type)
      .def_rw("set", &ConvertOptions::set)
      .def_rw("transformer_key", &ConvertOptions::transformer_key)
      .def_rw("vae_key", &ConvertOptions::vae_key)
      .def_rw("resume", &ConvertOptions::resume)
      .def_rw("shard_bytes", &ConvertOptions::shard_bytes);
  m.def("convert", &convert, nb::arg("options"), nb::arg("on_progress").none(),
        "on_progress(file, verifying, bytes_done, bytes_total)");
}

}  // namespace sparvar::python
