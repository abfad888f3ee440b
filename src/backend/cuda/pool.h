// Device memory that is handed out and taken back by bookkeeping alone, so that it can be done while a graph is
// recorded: work on one stream is ordered, and a block that was given back may be written by whatever comes next. A
// planning pool has no memory behind it; it adds up what would be needed, with the same bookkeeping.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace sparvar::cuda {

class Pool : public std::enable_shared_from_this<Pool> {
 public:
  /// `first_chunk` bytes are taken at once (0: none); more chunks of at least `step` bytes follow when they are needed.
  static std::shared_ptr<Pool> on_device(std::size_t first_chunk, std::size_t step);
  static std::shared_ptr<Pool> planning();
  /// Over memory of somebody else, which it neither takes nor gives back: 256-byte aligned, and never more of it.
  static std::shared_ptr<Pool> over(void* memory, std::size_t bytes);
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool();

  /// At least `bytes`, 256-byte aligned; goes back to the pool, which it keeps alive, with the last owner. Throws
  /// Error(system) where the device has no such memory, or where it would have to be asked for while a graph is
  /// recorded.
  std::shared_ptr<void> take(std::size_t bytes);
  /// While true no chunk is added.
  void set_fixed(bool fixed) { fixed_ = fixed; }
  /// Largest extent that was in use at once; of a device pool the bytes of its chunks.
  std::size_t peak() const;

 private:
  /// Contiguous addresses, of which some are free.
  struct Chunk {
    std::uintptr_t base = 0;
    std::size_t size = 0;
    std::map<std::uintptr_t, std::size_t> free;  // by address; neighbours are merged
  };
  Pool(bool planning, std::size_t step) : planning_(planning), step_(step) {}
  std::uintptr_t take_from(Chunk& chunk, std::size_t bytes);
  void add_chunk(std::size_t bytes);
  void give(std::uintptr_t block, std::size_t bytes);

  bool planning_;
  bool borrowed_ = false;
  bool fixed_ = false;
  std::size_t step_;
  std::vector<Chunk> chunks_;
};

}  // namespace sparvar::cuda
