// The attention kernel with a plan, on buffers of one's own: queries and keys of the last scale, [row][head][channel].
#include <sparvar/attention.h>

#include <cmath>
#include <iostream>
#include <vector>

int main() {
  try {
    const sparvar::ScaleSchedule schedule = {{1, 1}, {2, 2}, {4, 4}, {8, 8}, {16, 16}, {24, 24}};
    const int last = 5, layer = 0, heads = 4, dim = 64;
    sparvar::CslaAttention windows;
    windows.windows = {-1, -1, -1, 3, 5, 7};  // around each query, by key scale
    windows.sink_scales = 3;                  // the first scales are read whole
    const sparvar::AttentionPlan plan{"mine", {{.first_scale = 4, .method = windows}}};

    sparvar::PreparedAttention attention(plan, schedule, last, layer, {.heads = heads, .head_dim = dim, .threads = 2});
    const auto wave = [](std::size_t n, float step) {
      std::vector<float> x(n);
      for (std::size_t i = 0; i < n; ++i) x[i] = std::sin(step * static_cast<float>(i));
      return x;
    };
    const auto row = static_cast<std::size_t>(heads * dim);
    const auto q = wave(attention.queries() * row, 0.37F);
    const auto k = wave(attention.keys() * row, 0.11F), v = wave(attention.keys() * row, 0.05F);
    std::vector<float> out(q.size());

    const sparvar::AttentionStrides strides{.head = dim, .row = heads * dim};
    attention.run({q.data(), k.data(), v.data(), out.data(), strides, strides, strides, strides});
    std::cout << attention.queries() << " queries, " << attention.keys() << " keys, "
              << 100 * attention.share_of_pairs() << " % of the pairs; out[0] = " << out[0] << '\n';
  } catch (const sparvar::Error& error) {
    std::cerr << "attention: " << error.what() << '\n';
    return 1;
  }
}
