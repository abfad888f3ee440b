// A walk and the decoder behind it, for pictures of one shape.
#pragma once

#include "pipeline/walk.h"
#include "visual/bsq_vae.h"

namespace sparvar {

class Session {
 public:
  Session(Infinity& transformer, BsqVae& vae, Backend& backend, const StateShape& shape);
  Walk& walk() { return walk_; }
  /// Every program once; for Backend::reserve.
  void run_programs();
  /// Picture `index` of summed codes -> U8 [1, H, W, 3]: a tensor of the backend, that the next call overwrites.
  const Tensor& decode(const Tensor& codes, std::int64_t index);

 private:
  Backend& backend_;
  Walk walk_;
  Tensor codes_;  // of one picture: the feature maps of a decoder are the largest tensors of all
  Tensor pixels_;
  ProgramPtr decoder_;
};

}  // namespace sparvar
