// Draws many pictures in one process and says how memory grew after the first ten: many_pictures N MODEL_DIR
// Exit code 1 where it grew by 1 % or more. Prompts of every length in turn: caches by length must be bounded.
#include <fmt/format.h>
#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>

#include "sparvar/pipeline.h"

namespace {

double resident_mib() {
  malloc_trim(0);  // what the allocator keeps for later is no leak
  std::ifstream in("/proc/self/statm");
  long pages = 0, resident = 0;
  in >> pages >> resident;
  return static_cast<double>(resident) * static_cast<double>(sysconf(_SC_PAGESIZE)) / (1 << 20);
}

std::string prompt_of(int picture) {
  constexpr int kLengths = 5;
  std::string prompt = "red heart";
  for (int word = 0; word < picture % kLengths; ++word) prompt += " noto style";
  return prompt;
}

}  // namespace

int main(int argc, char** argv) {
  constexpr int kWarm = 10;
  const int pictures = argc > 1 ? std::max(std::atoi(argv[1]), kWarm + 1) : 1000;
  try {
    sparvar::Pipeline pipeline = sparvar::Pipeline::load({.model_dir = argc > 2 ? argv[2] : "", .threads = 1});
    const int scales = static_cast<int>(pipeline.info().schedule.size());
    double before = 0;
    for (int i = 0; i < pictures; ++i) {
      sparvar::GenerateOptions options;
      options.prompts = {prompt_of(i)};
      options.seed = static_cast<std::uint64_t>(i);
      options.plan = sparvar::AttentionPlan::preset("sparvar", pipeline.info().layers, scales);
      (void)pipeline.generate(options);
      if (i + 1 == kWarm) before = resident_mib();
    }
    const double after = resident_mib();
    const double growth = 100 * (after / before - 1);
    fmt::print("{} pictures: {:.2f} MiB after {}, {:.2f} MiB at the end: {:+.2f} %\n", pictures, before, kWarm, after,
               growth);
    return growth < 1 ? 0 : 1;
  } catch (const sparvar::Error& error) {
    fmt::print(stderr, "many_pictures: {}\n", error.what());
    return 1;
  }
}
