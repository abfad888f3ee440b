// The commands of the program: one file each, which declares every flag once and says what the command does.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>

namespace sparvar::cli {

/// What the chosen command does; set while the command line is parsed, called once all of it was understood.
using Action = std::function<void()>;

void add_generate(CLI::App& program, Action& chosen);
void add_compare(CLI::App& program, Action& chosen);
void add_evaluate(CLI::App& program, Action& chosen);
void add_analyze(CLI::App& program, Action& chosen);
void add_tune(CLI::App& program, Action& chosen);
void add_plan(CLI::App& program, Action& chosen);
void add_reconstruct(CLI::App& program, Action& chosen);
void add_convert(CLI::App& program, Action& chosen);
void add_info(CLI::App& program, Action& chosen);
void add_bench(CLI::App& program, Action& chosen);
void add_completion(CLI::App& program, Action& chosen);
void add_reference(CLI::App& program, Action& chosen);

/// Of `bench`.
void add_bench_attention(CLI::App& group, Action& chosen);
void add_bench_tokenizer(CLI::App& group, Action& chosen);

}  // namespace sparvar::cli
