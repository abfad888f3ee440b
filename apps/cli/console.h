// What goes to the terminal: errors as one line, and standard output that is checked.
#pragma once

#include <string>
#include <string_view>

namespace sparvar::cli {

/// "sparvar: message" on stderr; control characters, which a prompt or a file name may hold, become spaces.
void print_error(std::string_view message);

/// A word as a shell reads it back: quoted where it has to be.
std::string shell_word(const std::string& word);

/// A line on stderr, beside the results.
void print_aside(std::string_view line);

/// Throws Error(system) where stdout does not take it (a full disk). A reader that has gone is not an error of ours
/// to explain, but the exit code says it.
void print(std::string_view text);
void flush_stdout();

/// Is there a terminal behind this stream (where a bar can be redrawn)?
bool stderr_is_terminal();

}  // namespace sparvar::cli
