#include "core/open_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "sparvar/error.h"

namespace sparvar {
namespace {

std::string system_text(int code) { return std::generic_category().message(code); }

Error open_error(const std::string& path, int code) {
  if (code == ENOENT || code == ENOTDIR) return {ErrorKind::input, fmt::format("{}: no such file", path)};
  return {ErrorKind::system, fmt::format("{}: cannot be opened: {}", path, system_text(code))};
}

}  // namespace

OpenFile::OpenFile(const std::string& path) : path_(path) {
  // Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) throw open_error(path, errno);
  struct stat status {};
  const bool known = ::fstat(descriptor, &status) == 0;
  if (!known || !S_ISREG(status.st_mode)) {
    ::close(descriptor);
    throw Error(ErrorKind::input, fmt::format("{}: expected a file, found {}", path,
                                              S_ISDIR(status.st_mode) ? "a folder" : "something that is not a file"));
  }
  descriptor_ = descriptor;
  size_ = static_cast<std::uint64_t>(status.st_size);
}

OpenFile::~OpenFile() { ::close(descriptor_); }

std::size_t OpenFile::read_into(void* to) const {
  std::size_t done = 0;
  while (done < size_) {
    const ssize_t got = ::read(descriptor_, static_cast<std::byte*>(to) + done, size_ - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw Error(ErrorKind::system, fmt::format("{}: cannot be read: {}", path_, system_text(errno)));
    if (got == 0) break;  // it shrank meanwhile
    done += static_cast<std::size_t>(got);
  }
  return done;
}

std::shared_ptr<const std::byte> OpenFile::map() const {
  if (size_ == 0) return nullptr;
  void* address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor_, 0);
  if (address == MAP_FAILED)
    throw Error(ErrorKind::system, fmt::format("{}: {} bytes cannot be mapped: {}", path_, size_, system_text(errno)));
  return {static_cast<const std::byte*>(address),
          [address, size = size_](const std::byte*) { ::munmap(address, size); }};
}

std::string read_text(const std::string& path, std::uint64_t limit) {
  const OpenFile file(path);
  if (file.size() > limit)
    throw Error(ErrorKind::input, fmt::format("{}: {} bytes long, expected at most {}", path, file.size(), limit));
  return file.read();
}

}  // namespace sparvar
