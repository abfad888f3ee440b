// Files are whole or not there, whatever goes wrong.
#include "image/atomic_file.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <fstream>

#include "sparvar/error.h"
#include "temp_folder.h"

namespace sparvar {
namespace {

using testing::TempFolder;
using Names = std::vector<std::string>;

const std::vector<std::uint8_t> kNew(100000, 'n');

void write_old(const std::string& path) { std::ofstream(path) << "old"; }

std::string text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// What writing says; empty where it is written.
std::string complaint(const std::string& path) {
  try {
    write_file_atomically(path, kNew);
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::system);
    EXPECT_NE(std::string(error.what()).find(path), std::string::npos) << error.what();
    return error.what();
  }
  return "";
}

bool contains(const std::string& where, const std::string& what) { return where.find(what) != std::string::npos; }

TEST(AtomicFile, WritesAndReplaces) {
  const TempFolder folder;
  EXPECT_EQ(complaint(folder.path("a")), "");
  EXPECT_EQ(text(folder.path("a")), std::string(kNew.begin(), kNew.end()));
  write_old(folder.path("b"));
  EXPECT_EQ(complaint(folder.path("b")), "");
  EXPECT_EQ(text(folder.path("b")).size(), kNew.size());
  EXPECT_EQ(complaint(folder.path(std::string(255, 'x'))), "");  // the longest name there is
  EXPECT_EQ(folder.names(), (Names{"a", "b", std::string(255, 'x')}));
}

TEST(AtomicFile, HasTheRightsOfAnyNewFile) {
  const TempFolder folder;
  write_old(folder.path("plain"));
  EXPECT_EQ(complaint(folder.path("a")), "");
  struct stat plain {};
  struct stat written {};
  ASSERT_EQ(::stat(folder.path("plain").c_str(), &plain), 0);
  ASSERT_EQ(::stat(folder.path("a").c_str(), &written), 0);
  EXPECT_EQ(written.st_mode, plain.st_mode);
}

TEST(AtomicFile, AMissingFolderIsNamed) {
  const TempFolder folder;
  const std::string said = complaint(folder.path("none/a"));
  EXPECT_TRUE(contains(said, "No such file or directory")) << said;
  EXPECT_TRUE(contains(said, folder.path("none") + ":")) << said;
  write_old(folder.path("file"));
  EXPECT_NE(complaint(folder.path("file/a")), "");
  EXPECT_EQ(folder.names(), Names{"file"});
}

TEST(AtomicFile, AFolderIsNotReplaced) {
  const TempFolder folder;
  std::filesystem::create_directory(folder.path("sub"));
  EXPECT_TRUE(contains(complaint(folder.path("sub")), "folder"));
  EXPECT_TRUE(contains(complaint(folder.path("sub/")), "folder"));
  EXPECT_TRUE(contains(complaint(folder.path("new/")), "folder"));
  EXPECT_EQ(folder.names(), Names{"sub"});
}

TEST(AtomicFile, AnEmptyNameIsRefused) { EXPECT_THROW(write_file_atomically("", kNew), Error); }

TEST(AtomicFile, AFullDeviceIsAnErrorAndIsNotReplaced) {
  if (::access("/dev/full", W_OK) != 0) GTEST_SKIP() << "no /dev/full";
  EXPECT_TRUE(contains(complaint("/dev/full"), "No space left"));
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/full"));
}

// A limit on the size of files stands for a disk that fills up while the file is written.
TEST(AtomicFile, ADiskThatFillsUpLeavesTheOldFile) {
  const TempFolder folder;
  write_old(folder.path("a"));
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit small{30000, before.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string replacing = complaint(folder.path("a"));
  const std::string fresh = complaint(folder.path("b"));
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_TRUE(contains(replacing, "File too large")) << replacing;
  EXPECT_NE(fresh, "");
  EXPECT_EQ(text(folder.path("a")), "old");
  EXPECT_EQ(folder.names(), Names{"a"});
}

TEST(AtomicFile, AReadOnlyFolderIsAnError) {
  const TempFolder folder;
  std::filesystem::permissions(folder.path(), std::filesystem::perms{0555});
  const bool root = ::geteuid() == 0;
  if (root && ::seteuid(65534) != 0) GTEST_SKIP() << "root may write everywhere";
  const std::string said = complaint(folder.path("a"));
  ASSERT_EQ(::seteuid(root ? 0 : ::geteuid()), 0);
  EXPECT_TRUE(contains(said, "Permission denied")) << said;
  EXPECT_TRUE(folder.names().empty());
}

TEST(AtomicFile, ALinkStaysALink) {
  const TempFolder folder;
  write_old(folder.path("real"));
  std::filesystem::create_symlink("real", folder.path("link"));
  EXPECT_EQ(complaint(folder.path("link")), "");
  EXPECT_TRUE(std::filesystem::is_symlink(folder.path("link")));
  EXPECT_EQ(text(folder.path("real")).size(), kNew.size());
  EXPECT_EQ(folder.names(), (Names{"link", "real"}));
}

}  // namespace
}  // namespace sparvar
