// A walk and the decoder behind it, for pictures of one shape.
#pragma once

#include <limits>
#include <vector>

#include "pipeline/walk.h"
#include "visual/bsq_vae.h"

namespace sparvar {

class Session {
 public:
  static constexpr int kNoPreviews = std::numeric_limits<int>::max();

  /// `previews_from`: the first scale after which preview() may be called; takes memory where the backend records.
  Session(Infinity& transformer, BsqVae& vae, Backend& backend, const StateShape& shape,
          int previews_from = kNoPreviews);
  Walk& walk() { return walk_; }
  /// Can it draw pictures of its shape with previews from this scale on, `watched` or not? What is recorded lies around
  /// what is alive at that moment, so a session with previews that never came to its end is for such runs alone.
  bool is_for(int previews_from, bool watched) const {
    if (walk_.was_watched() && !watched) return false;
    return previews_from == previews_from_ || (decoded_ && previews_from > previews_from_);
  }
  /// Every program once; for Backend::reserve.
  void run_programs();
  /// Picture `index` of summed codes -> U8 [1, H, W, 3]: a tensor of the backend, that the next call overwrites.
  const Tensor& decode(const Tensor& codes, std::int64_t index);
  /// The same after `scale`, which is not the last one, of a walk that goes on.
  const Tensor& preview(const Tensor& codes, std::int64_t index, int scale);

 private:
  struct Decoder {
    ProgramPtr program;
    Tensor pixels;
  };
  bool has_preview(int scale) const;
  const Tensor& run(Decoder& decoder, const Tensor& codes, std::int64_t index);

  Backend& backend_;
  Walk walk_;
  int previews_from_;
  bool decoded_ = false;  // a picture: every program ran
  Tensor codes_;          // of one picture: the feature maps of a decoder are the largest tensors of all
  Decoder picture_;
  /// By scale, where the backend records: beside what the walk keeps at that point, and nothing else.
  std::vector<Decoder> previews_;
};

}  // namespace sparvar
