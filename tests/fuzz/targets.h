// What is fuzzed: each target reads bytes from outside as the program would. An Error is an answer; anything else
// (another exception, a crash, a leak, seconds of work) is a find.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace sparvar::fuzz {

using Input = std::span<const std::uint8_t>;

void read_safetensors(Input input);
void read_config(Input input);
void read_plan(Input input);
void tokenize_prompt(Input input);
void read_image(Input input);
void read_checkpoint(Input input);
void read_pickle(Input input);

struct Target {
  const char* name;
  void (*run)(Input);
};

constexpr Target kTargets[] = {
    {"safetensors", read_safetensors}, {"config", read_config}, {"plan", read_plan},
    {"prompt", tokenize_prompt},       {"image", read_image},   {"checkpoint", read_checkpoint},
    {"pickle", read_pickle},
};

}  // namespace sparvar::fuzz
