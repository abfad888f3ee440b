#include "pipeline/session.h"

namespace sparvar {

Session::Session(Infinity& transformer, BsqVae& vae, Backend& backend, const StateShape& shape)
    : backend_(backend), walk_(transformer, backend, shape) {
  const InfinityConfig& config = transformer.config();
  const Grid full = codes_grid(config, shape);
  codes_ = backend.zeros(DType::f32, {1, config.codebook_dim, full.h, full.w});
  decoder_ = backend.program([this, &vae] { pixels_ = vae.draw(codes_); });
}

void Session::run_programs() {
  walk_.run_programs();
  decoder_->run();
}

const Tensor& Session::decode(const Tensor& codes, std::int64_t index) {
  backend_.write(codes_, codes.rows(index, index + 1));
  decoder_->run();
  return pixels_;
}

}  // namespace sparvar
