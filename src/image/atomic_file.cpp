#include "image/atomic_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "sparvar/error.h"

namespace sparvar {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(const std::string& path, const std::string& why) {
  throw Error(ErrorKind::system, fmt::format("cannot write {}: {}", path, why));
}

std::string text_of(int error) { return std::generic_category().message(error); }

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  /// Delayed write errors (network disks, quotas) show here.
  int close() { return ::close(std::exchange(fd_, -1)); }

 private:
  int fd_;
};

/// Removes a file unless told that it is wanted.
class Scrap {
 public:
  explicit Scrap(std::string path) : path_(std::move(path)) {}
  Scrap(const Scrap&) = delete;
  Scrap& operator=(const Scrap&) = delete;
  ~Scrap() {
    if (!path_.empty()) ::unlink(path_.c_str());
  }
  void keep() { path_.clear(); }

 private:
  std::string path_;
};

void write_all(int fd, std::span<const std::uint8_t> bytes, const std::string& path) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(fd, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail(path, text_of(errno));
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

void write_device(const std::string& path, std::span<const std::uint8_t> bytes) {
  Descriptor file(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (file.get() < 0) fail(path, text_of(errno));
  write_all(file.get(), bytes, path);
  if (file.close() != 0) fail(path, text_of(errno));
}

/// A name that no other thread or process uses; short, so that it fits wherever the wanted name fits.
fs::path temporary_name(const fs::path& folder) {
  static std::atomic<unsigned> counter{0};
  return folder / fmt::format(".sparvar-{}-{}.tmp", ::getpid(), counter++);
}

fs::path folder_of(const fs::path& target) { return target.has_parent_path() ? target.parent_path() : fs::path("."); }

void require_folder(const fs::path& folder, const std::string& path) {
  struct stat status {};
  if (::stat(folder.c_str(), &status) != 0)
    fail(path, fmt::format("its folder {}: {}; create it first", folder.string(), text_of(errno)));
  if (!S_ISDIR(status.st_mode)) fail(path, fmt::format("{} is not a folder", folder.string()));
}

/// A link stays a link.
fs::path resolve(const std::string& path, bool exists) {
  std::error_code ignored;
  const fs::path resolved = exists ? fs::canonical(path, ignored) : fs::path(path);
  return resolved.empty() ? fs::path(path) : resolved;
}

}  // namespace

struct AtomicWriter::State {
  State(const std::string& wanted, fs::path resolved)
      : path(wanted),
        target(std::move(resolved)),
        aside(prepare(target, wanted)),
        file(create(aside, wanted)),
        scrap(aside) {}

  static std::string prepare(const fs::path& target, const std::string& path) {
    require_folder(folder_of(target), path);
    return temporary_name(folder_of(target)).string();
  }

  /// A file of this name can only be left over from a process that was killed and had our id.
  static int create(const std::string& aside, const std::string& path) {
    ::unlink(aside.c_str());
    const int file = ::open(aside.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (file < 0) fail(path, text_of(errno));
    return file;
  }

  std::string path;
  fs::path target;
  std::string aside;
  Descriptor file;
  Scrap scrap;
};

AtomicWriter::AtomicWriter(const std::string& path)
    : state_(std::make_unique<State>(path, resolve(path, ::access(path.c_str(), F_OK) == 0))) {}

AtomicWriter::~AtomicWriter() = default;

void AtomicWriter::write(std::span<const std::uint8_t> bytes) { write_all(state_->file.get(), bytes, state_->path); }

void AtomicWriter::commit() {
  const std::string& path = state_->path;
  if (::fsync(state_->file.get()) != 0 && errno != EINVAL)  // EINVAL: the file system has no fsync
    fail(path, text_of(errno));
  if (state_->file.close() != 0) fail(path, text_of(errno));
  if (::rename(state_->aside.c_str(), state_->target.c_str()) != 0) fail(path, text_of(errno));
  state_->scrap.keep();
}

void remove_left_pieces(const std::string& folder) {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder, ignored)) {
    int process = 0;
    unsigned number = 0;
    char end = 0;
    const std::string name = entry.path().filename().string();
    if (std::sscanf(name.c_str(), ".sparvar-%d-%u.tm%c", &process, &number, &end) != 3 || end != 'p' || process <= 0)
      continue;
    if (::kill(process, 0) != 0 && errno == ESRCH) ::unlink(entry.path().c_str());
  }
}

void write_file_atomically(const std::string& path, std::span<const std::uint8_t> bytes) {
  if (path.empty()) throw Error(ErrorKind::system, "cannot write a file without a name");
  struct stat status {};
  const bool exists = ::stat(path.c_str(), &status) == 0;
  if (exists && S_ISDIR(status.st_mode)) fail(path, "it is a folder; name a file");
  if (path.back() == '/') fail(path, "it names a folder; name a file");
  if (exists && !S_ISREG(status.st_mode)) return write_device(path, bytes);  // renaming over /dev/null would replace it
  AtomicWriter writer(path);
  writer.write(bytes);
  writer.commit();
}

}  // namespace sparvar
