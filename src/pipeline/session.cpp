#include "pipeline/session.h"

namespace sparvar {

Session::Session(Infinity& transformer, BsqVae& vae, Backend& backend, const StateShape& shape, int previews_from)
    : backend_(backend), walk_(transformer, backend, shape), previews_from_(previews_from) {
  const InfinityConfig& config = transformer.config();
  const Grid full = codes_grid(config, shape);
  codes_ = backend.zeros(DType::f32, {1, config.codebook_dim, full.h, full.w});
  const auto make = [&](Decoder& decoder) {
    decoder.program = backend.program([this, &vae, &decoder] { decoder.pixels = vae.draw(codes_); });
  };
  make(picture_);
  if (!backend.records() || previews_from == kNoPreviews) return;
  previews_.resize(shape.schedule.size());
  for (Decoder& decoder : previews_) make(decoder);
}

bool Session::has_preview(int scale) const {
  return scale >= previews_from_ && scale + 1 < static_cast<int>(walk_.shape().schedule.size());
}

void Session::run_programs() {
  walk_.run_programs([this](int scale) {
    if (!previews_.empty() && has_preview(scale)) previews_[scale].program->run();
  });
  picture_.program->run();
}

const Tensor& Session::decode(const Tensor& codes, std::int64_t index) {
  const Tensor& pixels = run(picture_, codes, index);
  decoded_ = true;
  return pixels;
}

const Tensor& Session::preview(const Tensor& codes, std::int64_t index, int scale) {
  if (!has_preview(scale))
    throw Error(ErrorKind::usage, "a preview after a scale that this session was not made to show");
  return run(previews_.empty() ? picture_ : previews_[scale], codes, index);
}

const Tensor& Session::run(Decoder& decoder, const Tensor& codes, std::int64_t index) {
  backend_.write(codes_, codes.rows(index, index + 1));
  decoder.program->run();
  return decoder.pixels;
}

}  // namespace sparvar
