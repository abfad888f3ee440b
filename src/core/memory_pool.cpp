#include "core/memory_pool.h"

#include <fmt/format.h>

#include <cstdlib>
#include <map>
#include <mutex>

#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr std::size_t kAlignment = 64;

class Pool {
 public:
  Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() { trim(); }

  void* take(std::size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      // A block up to a quarter larger than asked for is good enough.
      const auto found = free_.lower_bound(bytes);
      if (found != free_.end() && found->first <= bytes + bytes / 4) {
        void* block = found->second;
        free_.erase(found);
        return block;
      }
    }
    void* block = std::aligned_alloc(kAlignment, bytes);
    if (block == nullptr) {
      trim();
      block = std::aligned_alloc(kAlignment, bytes);
    }
    if (block == nullptr)
      throw Error(ErrorKind::system,
                  fmt::format("out of memory: {:.1f} MiB more were needed; try fewer pictures at once",
                              static_cast<double>(bytes) / (1 << 20)));
    return block;
  }

  void give(void* block, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    free_.emplace(bytes, block);
  }

  void trim() {
    const std::lock_guard lock(mutex_);
    for (const auto& [bytes, block] : free_) std::free(block);
    free_.clear();
  }

 private:
  std::mutex mutex_;
  std::multimap<std::size_t, void*> free_;
};

// Shared, so that tensors which outlive static destruction still find their pool.
const std::shared_ptr<Pool>& pool() {
  static const auto instance = std::make_shared<Pool>();
  return instance;
}

}  // namespace

std::shared_ptr<void> pooled_storage(std::size_t bytes) {
  const std::size_t rounded = (bytes + kAlignment) / kAlignment * kAlignment;
  const std::shared_ptr<Pool>& owner = pool();
  return {owner->take(rounded), [owner, rounded](void* block) { owner->give(block, rounded); }};
}

void trim_pool() { pool()->trim(); }

}  // namespace sparvar
