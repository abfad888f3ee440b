#include "backend/cuda/pool.h"

#include <algorithm>

#include "backend/cuda/check.h"

namespace sparvar::cuda {
namespace {

constexpr std::size_t kAlignment = 256;
constexpr std::uintptr_t kPlanningBase = std::uintptr_t{1} << 44;  // not null, and no address of anything

}  // namespace

std::shared_ptr<Pool> Pool::on_device(std::size_t first_chunk, std::size_t step) {
  std::shared_ptr<Pool> pool(new Pool(false, step));
  if (first_chunk > 0) pool->add_chunk(first_chunk);
  return pool;
}

std::shared_ptr<Pool> Pool::planning() {
  std::shared_ptr<Pool> pool(new Pool(true, 0));
  pool->chunks_.push_back({.base = kPlanningBase, .size = 0, .free = {}});
  return pool;
}

std::shared_ptr<Pool> Pool::over(void* memory, std::size_t bytes) {
  std::shared_ptr<Pool> pool(new Pool(false, 0));
  pool->borrowed_ = pool->fixed_ = true;
  Chunk chunk{.base = reinterpret_cast<std::uintptr_t>(memory), .size = bytes, .free = {}};
  if (bytes > 0) chunk.free.emplace(chunk.base, bytes);
  pool->chunks_.push_back(std::move(chunk));
  return pool;
}

Pool::~Pool() {
  if (planning_ || borrowed_) return;
  for (const Chunk& chunk : chunks_) (void)cudaFree(reinterpret_cast<void*>(chunk.base));  // NOLINT
}

void Pool::add_chunk(std::size_t bytes) {
  const std::size_t size = (std::max(bytes, step_) + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = nullptr;
  if (cudaMalloc(&memory, size) != cudaSuccess) {
    (void)cudaGetLastError();
    std::size_t available = 0, total = 0;
    (void)cudaMemGetInfo(&available, &total);
    throw Error(ErrorKind::system,
                fmt::format("out of GPU memory: {:.2f} GiB more were needed and {:.2f} of {:.2f} are free; draw fewer "
                            "pictures at once (--batch 1)",
                            static_cast<double>(size) / (1 << 30), static_cast<double>(available) / (1 << 30),
                            static_cast<double>(total) / (1 << 30)));
  }
  Chunk chunk{.base = reinterpret_cast<std::uintptr_t>(memory), .size = size, .free = {}};
  chunk.free.emplace(chunk.base, size);
  chunks_.push_back(std::move(chunk));
}

/// The smallest free block that is large enough; the one at the chunk's end last, so that a device chunk is filled
/// exactly as a planning chunk, which grows at its end. 0: none.
std::uintptr_t Pool::take_from(Chunk& chunk, std::size_t bytes) {
  const auto at_end = [&chunk](auto block) { return block->first + block->second == chunk.base + chunk.size; };
  auto best = chunk.free.end();
  for (auto block = chunk.free.begin(); block != chunk.free.end(); ++block)
    if (!at_end(block) && block->second >= bytes && (best == chunk.free.end() || block->second < best->second))
      best = block;
  if (best == chunk.free.end()) {
    if (chunk.free.empty() || !at_end(std::prev(chunk.free.end()))) chunk.free.emplace(chunk.base + chunk.size, 0);
    best = std::prev(chunk.free.end());
    if (planning_ && best->second < bytes) {
      chunk.size += bytes - best->second;
      best->second = bytes;
    }
  }
  const auto [address, size] = *best;
  if (size >= bytes || size == 0) chunk.free.erase(best);
  if (size < bytes) return 0;
  if (size > bytes) chunk.free.emplace(address + bytes, size - bytes);
  return address;
}

std::shared_ptr<void> Pool::take(std::size_t bytes) {
  const std::size_t rounded = std::max<std::size_t>((bytes + kAlignment - 1) / kAlignment, 1) * kAlignment;
  std::uintptr_t block = 0;
  for (Chunk& chunk : chunks_)
    if (block = take_from(chunk, rounded); block != 0) break;
  if (block == 0) {
    if (fixed_)
      throw Error(ErrorKind::system, fmt::format("a recorded program needs {} bytes more than were planned", rounded));
    add_chunk(rounded);
    block = take_from(chunks_.back(), rounded);
  }
  return {reinterpret_cast<void*>(block),  // NOLINT
          [owner = shared_from_this(), rounded](void* address) {
            owner->give(reinterpret_cast<std::uintptr_t>(address), rounded);
          }};
}

void Pool::give(std::uintptr_t block, std::size_t bytes) {
  const auto chunk = std::find_if(chunks_.begin(), chunks_.end(),
                                  [block](const Chunk& c) { return block >= c.base && block < c.base + c.size; });
  auto& free = chunk->free;
  const auto next = free.lower_bound(block);
  auto here = free.emplace_hint(next, block, bytes);
  if (next != free.end() && here->first + here->second == next->first) {
    here->second += next->second;
    free.erase(next);
  }
  if (here != free.begin()) {
    const auto before = std::prev(here);
    if (before->first + before->second == here->first) {
      before->second += here->second;
      free.erase(here);
    }
  }
}

std::size_t Pool::peak() const {
  std::size_t sum = 0;
  for (const Chunk& chunk : chunks_) sum += chunk.size;
  return sum;
}

}  // namespace sparvar::cuda
