// The program `sparvar`: parses the command line, runs one command, turns every failure into one line and an exit code.
#include <fcntl.h>
#include <unistd.h>

#include <csignal>
#include <exception>
#include <new>

#include "commands.h"
#include "console.h"
#include "interrupt.h"
#include "sparvar/error.h"
#include "suggest.h"

namespace {

enum ExitCode { success = 0, failure = 1, usage = 2 };

/// Parses, then runs what was chosen.
void run(CLI::App& program, const sparvar::cli::Action& chosen, int argc, const char* const* argv) {
  program.parse(argc, argv);
  sparvar::cli::refuse_unknown(program);
  chosen();
  sparvar::cli::flush_stdout();
}

int exit_code(const sparvar::Error& error) {
  switch (error.kind()) {
    case sparvar::ErrorKind::usage:
      return usage;
    case sparvar::ErrorKind::cancelled:
      return sparvar::cli::interrupted_exit_code();
    default:
      return failure;
  }
}

/// Where a standard stream is closed, the next file opened would take its number and get what is printed. Writing to
/// what is put there instead fails, as it should.
void occupy_closed_streams() {
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    if (fcntl(stream, F_GETFD) < 0) (void)open("/dev/null", stream == STDIN_FILENO ? O_WRONLY : O_RDONLY);
}

}  // namespace

int main(int argc, char** argv) {
  occupy_closed_streams();
  // A closed pipe or a file-size limit is an error of the write that meets it, with a message and a clean end.
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
  try {
    CLI::App program("Draws pictures from text with visual autoregressive models and sparse attention.", "sparvar");
    sparvar::cli::Action chosen;
    program.set_version_flag("--version", "sparvar " SPARVAR_VERSION, "Prints the version");
    program.require_subcommand(0, 1);
    program.allow_extras();  // refuse_unknown names them
    sparvar::cli::add_generate(program, chosen);
    sparvar::cli::add_compare(program, chosen);
    sparvar::cli::add_evaluate(program, chosen);
    sparvar::cli::add_analyze(program, chosen);
    sparvar::cli::add_tune(program, chosen);
    sparvar::cli::add_plan(program, chosen);
    sparvar::cli::add_reconstruct(program, chosen);
    sparvar::cli::add_convert(program, chosen);
    sparvar::cli::add_info(program, chosen);
    sparvar::cli::add_bench(program, chosen);
    sparvar::cli::add_completion(program, chosen);
    sparvar::cli::add_reference(program, chosen);
    try {
      run(program, chosen, argc, argv);
    } catch (const CLI::Success& help) {  // --help and --version
      program.exit(help);
      sparvar::cli::flush_stdout();
    }
    return success;
  } catch (const CLI::Error& error) {
    sparvar::cli::print_error(error.what());
    return usage;
  } catch (const sparvar::Error& error) {
    sparvar::cli::print_error(error.what());
    return exit_code(error);
  } catch (const std::bad_alloc&) {
    sparvar::cli::print_error("out of memory; fewer pictures or --dtype bf16 need less");
    return failure;
  } catch (const std::exception& error) {
    sparvar::cli::print_error(error.what());
    return failure;
  }
}
