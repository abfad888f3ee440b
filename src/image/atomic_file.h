// Files that are whole or not there.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace sparvar {

/// Writes `bytes` aside, in the same folder, then renames: `path` holds all of them or what it held before, and nothing
/// is left behind on failure. Devices and pipes are written directly. Throws Error(system) naming the path and the
/// cause.
void write_file_atomically(const std::string& path, std::span<const std::uint8_t> bytes);

/// The same for a plain file that is written piece by piece: there is no file until commit(), and the pieces go where
/// the writer is destroyed before.
class AtomicWriter {
 public:
  explicit AtomicWriter(const std::string& path);
  AtomicWriter(const AtomicWriter&) = delete;
  AtomicWriter& operator=(const AtomicWriter&) = delete;
  ~AtomicWriter();
  void write(std::span<const std::uint8_t> bytes);
  void commit();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Removes what writers of processes that are gone (killed) left in a folder.
void remove_left_pieces(const std::string& folder);

}  // namespace sparvar
