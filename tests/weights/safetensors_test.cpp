#include "weights/safetensors.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <ostream>

#include "core/e4m3.h"
#include "sparvar/error.h"
#include "support.h"
#include "temp_folder.h"

namespace sparvar {
namespace {

using testing::TempFolder;

std::string little_endian(std::uint64_t value) {
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &value, 8);
  return bytes;
}

/// A file with this header and so many bytes of data (0, 1, 2, ...).
std::string file_of(const std::string& header, std::size_t data_bytes) {
  std::string data(data_bytes, '\0');
  std::iota(data.begin(), data.end(), '\0');
  return little_endian(header.size()) + header + data;
}

std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape,
                   const std::string& span) {
  return fmt::format(R"("{}":{{"dtype":"{}","shape":{},"data_offsets":{}}})", name, dtype, shape, span);
}

std::string object(const std::vector<std::string>& members) { return fmt::format("{{{}}}", fmt::join(members, ",")); }

std::string error_of(const std::string& path) {
  try {
    TensorFile::open(path);
  } catch (const Error& failure) {
    EXPECT_EQ(std::string(failure.what()).find('\n'), std::string::npos) << "one line";
    return failure.what();
  }
  return "accepted";
}

struct BadFile {
  const char* name;
  std::string bytes;
  std::vector<std::string> expected;  // each is part of the message; the path always is
};

void PrintTo(const BadFile& file, std::ostream* out) { *out << file.name; }

std::string repeated(const std::string& part, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += part;
  return out;
}

std::vector<BadFile> bad_files() {
  const std::string one = object({tensor("w", "F32", "[2]", "[0,8]")});
  const auto with = [](const std::string& dtype, const std::string& shape, const std::string& span, std::size_t bytes) {
    return file_of(object({tensor("w", dtype, shape, span)}), bytes);
  };
  return {
      {"Empty", "", {"empty", "at least 8 bytes", "found 0"}},
      {"ShorterThanEightBytes", std::string(7, '\0'), {"at least 8 bytes", "found 7"}},
      {"HeaderLengthWraps", little_endian(~std::uint64_t{0} - 3) + one, {"18446744073709551612", "at most 100000000"}},
      {"HeaderLengthWrapsToZero", little_endian(~std::uint64_t{0} - 7) + one, {"at most 100000000"}},
      {"HeaderOver100MB", little_endian(100'000'001) + one, {"100000001", "at most 100000000"}},
      {"HeaderLongerThanFile", little_endian(one.size() + 1) + one, {"only", "follow"}},
      {"HeaderOfNothing", little_endian(0), {"begins with '{'"}},
      {"HeaderNotUtf8", file_of("{\"w\xff\":{}}", 0), {"header", "not valid JSON", "UTF-8"}},
      {"HeaderOpenBraceOnly", file_of("{", 0), {"header", "not valid JSON"}},
      {"HeaderIsAList", file_of("[]", 0), {"begins with '{'"}},
      {"HeaderBeginsWithSpaces", file_of(fmt::format("  {}", one), 8), {"begins with '{'"}},
      {"HeaderFollowedByText", file_of(one + "x", 8), {"not valid JSON"}},
      {"HeaderEndsAtANul", file_of(one + std::string(1, '\0') + "garbage", 8), {"not valid JSON", "NUL"}},
      {"TrailingBytes", file_of(one, 9), {"expected 8 bytes of data, found 9"}},
      {"TrailingBytesAfterNoTensor", file_of("{}", 1), {"expected 0 bytes of data, found 1"}},
      {"DataTwoBytesShort", file_of(one, 6), {"'w'", "[0, 8]", "at most 6"}},
      {"OffsetsBeyondTheFile",
       with("F32", "[2]", "[1000000000000,1000000000008]", 8),
       {"'w'", "1000000000008", "at most 8"}},
      {"BeginAfterEnd", with("F32", "[2]", "[8,0]", 8), {"'w'", "[8, 0]", "end before they begin"}},
      {"OneOffset", with("F32", "[2]", "[8]", 8), {"'w'", "two whole numbers", "[8]"}},
      {"ThreeOffsets", with("F32", "[2]", "[0,4,8]", 8), {"'w'", "two whole numbers", "[0,4,8]"}},
      {"NegativeOffset", with("F32", "[2]", "[-8,0]", 8), {"'w'", "two whole numbers", "[-8,0]"}},
      {"FractionalOffset", with("F32", "[2]", "[0,8.0]", 8), {"'w'", "two whole numbers"}},
      {"OffsetsAsText", with("F32", "[2]", R"("0,8")", 8), {"'w'", "two whole numbers", "the text '0,8'"}},
      {"HoleBeforeTheFirst", with("F32", "[1]", "[4,8]", 8), {"'w'", "from byte 0", "found byte 4", "hole"}},
      {"HoleBetween",
       file_of(object({tensor("a", "U8", "[2]", "[0,2]"), tensor("b", "U8", "[2]", "[3,5]")}), 5),
       {"'b'", "from byte 2", "found byte 3", "hole"}},
      {"Overlap",
       file_of(object({tensor("a", "U8", "[4]", "[0,4]"), tensor("b", "U8", "[4]", "[2,6]")}), 6),
       {"'b'", "from byte 4", "found byte 2", "overlap"}},
      {"SamePlaceTwice",
       file_of(object({tensor("a", "U8", "[4]", "[0,4]"), tensor("b", "U8", "[4]", "[0,4]")}), 4),
       {"'b'", "overlap"}},
      {"SpanUnequalToShape",
       with("F32", "[32,8]", "[0,65536]", 65536),
       {"'w'", "F32 [32, 8]", "needs 1024 bytes", "65536"}},
      {"Fp8CutShort", with("F8_E4M3", "[4,4]", "[0,16]", 15), {"'w'", "[0, 16]", "at most 15"}},
      {"Fp8SpanUnequalToShape", with("F8_E4M3", "[4,4]", "[0,32]", 32), {"F8_E4M3 [4, 4]", "needs 16 bytes", "32"}},
      {"OtherFp8", with("F8_E5M2", "[2]", "[0,2]", 2), {"'w'", "unknown dtype 'F8_E5M2'", "F8_E4M3"}},
      {"SpanUnequalToDtype", with("F16", "[2]", "[0,8]", 8), {"'w'", "F16 [2]", "needs 4 bytes", "8"}},
      {"ProductWrapsToZero", with("F32", "[4294967296,4294967296]", "[0,0]", 0), {"'w'", "4294967296", "64 bits"}},
      {"ProductWrapsBeforeAZero", with("U8", "[4294967296,4294967296,0]", "[0,0]", 0), {"'w'", "64 bits"}},
      {"BytesWrapToZero", with("F32", "[4611686018427387904]", "[0,0]", 0), {"'w'", "64 bits"}},
      {"NegativeDimension", with("F32", "[-2]", "[0,8]", 8), {"'w'", "dimensions", "-2"}},
      {"TwoNegativeDimensions", with("F32", "[-1,-2]", "[0,8]", 8), {"'w'", "dimensions", "-1"}},
      {"FractionalDimension", with("F32", "[2.0]", "[0,8]", 8), {"'w'", "dimensions", "2.0"}},
      {"DimensionAbove63Bits",
       with("F32", "[18446744073709551615]", "[0,8]", 8),
       {"'w'", "dimensions", "18446744073709551615"}},
      {"ShapeIsANumber", with("F32", "2", "[0,8]", 8), {"'w'", "shape", "found 2"}},
      {"TooManyDimensions",
       with("U8", fmt::format("[{}1]", repeated("1,", 999)), "[0,1]", 1),
       {"'w'", "at most 16 dimensions"}},
      {"UnknownDtype", with("F12", "[2]", "[0,3]", 3), {"'w'", "unknown dtype 'F12'", "expected F64, F32"}},
      {"DtypeIsANumber", file_of(R"({"w":{"dtype":32,"shape":[2],"data_offsets":[0,8]}})", 8), {"'w'", "dtype", "32"}},
      {"NoDtype", file_of(R"({"w":{"shape":[2],"data_offsets":[0,8]}})", 8), {"'w'", "'dtype'", "found none"}},
      {"NoShape", file_of(R"({"w":{"dtype":"F32","data_offsets":[0,8]}})", 8), {"'w'", "'shape'", "found none"}},
      {"NoOffsets", file_of(R"({"w":{"dtype":"F32","shape":[2]}})", 8), {"'w'", "'data_offsets'", "found none"}},
      {"TensorIsAList", file_of(R"({"w":[]})", 0), {"'w'", "expected an object, found []"}},
      {"DuplicateName",
       file_of(object({tensor("w", "U8", "[2]", "[0,2]"), tensor("w", "U8", "[2]", "[2,4]")}), 4),
       {"'w'", "twice"}},
      {"DuplicateEscapedName",
       file_of(object({tensor("w", "U8", "[2]", "[0,2]"), tensor("\\u0077", "U8", "[2]", "[2,4]")}), 4),
       {"'w'", "twice"}},
      {"DuplicateKey",
       file_of(R"({"w":{"dtype":"U8","shape":[2],"shape":[1],"data_offsets":[0,2]}})", 2),
       {"'shape'", "twice"}},
      {"MetadataIsAText", file_of(R"({"__metadata__":"x"})", 0), {"__metadata__", "the text 'x'"}},
      {"MetadataOfNumbers", file_of(R"({"__metadata__":{"a":1}})", 0), {"__metadata__"}},
      {"NestingBomb", file_of(fmt::format("{{\"w\":{}", repeated("[", 1'000'000)), 0), {"nested deeper than 8"}},
      {"NestedObjectsBomb", file_of(repeated("{\"w\":", 100'000), 0), {"nested deeper than 8"}},
      {"NameWithLineEnds", file_of("{\"a\\nb\\u001b[31m\":{}}", 0), {"'a?b?[31m'"}},
      {"VeryLongName", file_of(fmt::format("{{\"{}\":{{}}}}", std::string(100'000, 'n')), 0), {"nnn...'"}},
  };
}

class BadSafetensors : public ::testing::TestWithParam<BadFile> {};

TEST_P(BadSafetensors, IsRefusedInOneLineThatSaysWhy) {
  const TempFolder folder;
  const std::string path = folder.write("bad.safetensors", GetParam().bytes);
  const std::string message = error_of(path);
  EXPECT_EQ(message.find(path), 0U) << message;
  for (const std::string& part : GetParam().expected)
    EXPECT_NE(message.find(part), std::string::npos) << part << " in: " << message;
  EXPECT_LT(message.size(), 600U);
}

INSTANTIATE_TEST_SUITE_P(Cases, BadSafetensors, ::testing::ValuesIn(bad_files()),
                         [](const auto& tested) { return std::string(tested.param.name); });

TEST(Safetensors, FewBytesThatAskForGigabytesAllocateNothing) {
  const TempFolder folder;
  const std::string path =
      folder.write("bomb.safetensors", file_of(object({tensor("w", "F32", "[4,268435456]", "[0,4294967296]")}), 80));
  struct rusage before {};
  struct rusage after {};
  ::getrusage(RUSAGE_SELF, &before);
  EXPECT_NE(error_of(path).find("pass the end of the file"), std::string::npos);
  ::getrusage(RUSAGE_SELF, &after);
  EXPECT_LT(after.ru_maxrss - before.ru_maxrss, 64 * 1024) << "KiB of memory more";
}

TEST(Safetensors, NoFile) {
  const TempFolder folder;
  const std::string path = folder.path("none.safetensors");
  EXPECT_EQ(error_of(path), path + ": no such file");
}

TEST(Safetensors, FolderInsteadOfFile) {
  const TempFolder folder;
  EXPECT_NE(error_of(folder.path()).find("expected a file, found a folder"), std::string::npos);
}

TEST(Safetensors, PipeInsteadOfFileDoesNotWait) {
  const TempFolder folder;
  const std::string path = folder.path("pipe.safetensors");
  ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
  EXPECT_NE(error_of(path).find("not a file"), std::string::npos);
}

TEST(Safetensors, FileThatMayNotBeRead) {
  if (::geteuid() == 0) GTEST_SKIP() << "root may read everything";
  const TempFolder folder;
  const std::string path = folder.write("locked.safetensors", file_of("{}", 0));
  ASSERT_EQ(::chmod(path.c_str(), 0), 0);
  EXPECT_NE(error_of(path).find("cannot be opened"), std::string::npos);
}

TEST(Safetensors, AcceptsZeroSizeScalarPaddingAndMetadata) {
  const TempFolder folder;
  const std::string header = R"({"__metadata__":{"format":"pt","note":""},)" +
                             tensor("empty", "F32", "[0,4]", "[0,0]") + "," + tensor("scalar", "U8", "[]", "[0,1]") +
                             "," + tensor("after", "I16", "[0]", "[1,1]") + "}     ";
  const TensorFile file = TensorFile::open(folder.write("ok.safetensors", file_of(header, 1)));
  EXPECT_EQ(file.names(), (std::vector<std::string>{"after", "empty", "scalar"}));
  EXPECT_EQ(file.get("empty").shape(), (Shape{0, 4}));
  EXPECT_EQ(file.get("empty").size(), 0);
  EXPECT_EQ(file.get("scalar").rank(), 0);
  EXPECT_EQ(file.get("scalar").size(), 1);
  EXPECT_EQ(file.get("scalar").data<std::uint8_t>()[0], 0);
  EXPECT_EQ(file.parameters(), 1);
  EXPECT_FALSE(file.has("__metadata__"));
}

TEST(Safetensors, AcceptsNoTensorsAtAll) {
  const TempFolder folder;
  EXPECT_TRUE(TensorFile::open(folder.write("none.safetensors", file_of("{}", 0))).names().empty());
}

TEST(Safetensors, ReadsEveryDtype) {
  const TempFolder folder;
  std::string header = "{";
  std::size_t at = 0;
  const std::vector<std::pair<DType, std::string>> dtypes = {
      {DType::f64, "F64"},   {DType::i64, "I64"}, {DType::f32, "F32"}, {DType::i32, "I32"}, {DType::f16, "F16"},
      {DType::bf16, "BF16"}, {DType::i16, "I16"}, {DType::i8, "I8"},   {DType::u8, "U8"},   {DType::boolean, "BOOL"}};
  for (const auto& [dtype, name] : dtypes) {
    const std::size_t end = at + 3 * size_of(dtype);
    header += tensor(name, name, "[3]", fmt::format("[{},{}]", at, end)) + ",";
    at = end;
  }
  header.back() = '}';
  const TensorFile file = TensorFile::open(folder.write("all.safetensors", file_of(header, at)));
  for (const auto& [dtype, name] : dtypes) EXPECT_EQ(file.get(name, {3}).dtype(), dtype);
  EXPECT_EQ(file.get("U8").data<std::uint8_t>()[1], static_cast<std::uint8_t>(at - 5));
}

// A header of any length is legal, so data may lie at any address: it must not be read through a misaligned pointer.
TEST(Safetensors, CopiesDataThatIsNotAligned) {
  const std::vector<float> values = {1.5F, -2.25F, 3e30F};
  std::string data(1 + 12, '\7');
  std::memcpy(data.data() + 1, values.data(), 12);
  for (std::size_t padding = 0; padding < 8; ++padding) {
    const TempFolder folder;
    std::string bytes = object({tensor("byte", "U8", "[1]", "[0,1]"), tensor("w", "F32", "[3]", "[1,13]")});
    bytes.append(padding, ' ');
    bytes.insert(0, little_endian(bytes.size()));
    bytes += data;
    const TensorFile file = TensorFile::open(folder.write("odd.safetensors", bytes));
    const Tensor& w = file.get("w");
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(w.raw()) % alignof(float), 0U);
    for (std::size_t i = 0; i < values.size(); ++i) EXPECT_EQ(w.data<float>()[i], values[i]);
    EXPECT_EQ(file.get("byte").data<std::uint8_t>()[0], 7);
  }
}

TEST(Safetensors, DataOutlivesTheFileObject) {
  const TempFolder folder;
  Tensor w;
  {
    const TensorFile file = TensorFile::open(
        folder.write("w.safetensors", file_of(object({tensor("w", "U8", "[5000]", "[0,5000]")}), 5000)));
    w = file.get("w");
  }
  EXPECT_EQ(w.data<std::uint8_t>()[4999], static_cast<std::uint8_t>(4999));
}

TEST(Safetensors, GetSaysWhatIsMissingOrDiffers) {
  const TempFolder folder;
  const std::string path = folder.write("w.safetensors", file_of(object({tensor("w", "BF16", "[1,2]", "[0,4]")}), 4));
  const TensorFile file = TensorFile::open(path);
  const auto message = [&](const auto& call) -> std::string {
    try {
      call();
    } catch (const Error& failure) {
      return failure.what();
    }
    return "accepted";
  };
  EXPECT_EQ(message([&] { (void)file.get("v"); }), path + ": tensor 'v': missing; the file has 1 other tensors");
  EXPECT_EQ(message([&] { (void)file.get("w", {2, 1}); }), path + ": tensor 'w': expected shape [2, 1], found [1, 2]");
  EXPECT_EQ(message([&] { (void)file.f32("w", {2}); }), path + ": tensor 'w': expected shape [2], found [1, 2]");
  EXPECT_EQ(file.f32("w", {1, 2}).data<float>()[1], std::bit_cast<float>(0x03020000U));
}

struct BadIndex {
  const char* name;
  std::string json;
  std::vector<std::string> expected;
};

void PrintTo(const BadIndex& index, std::ostream* out) { *out << index.name; }

std::vector<BadIndex> bad_indexes() {
  const auto map = [](const std::string& shard) { return fmt::format(R"({{"weight_map":{{"a":"{}"}}}})", shard); };
  return {
      {"NotJson", "weights", {"not valid JSON"}},
      {"NoMap", R"({"metadata":{}})", {"weight_map"}},
      {"MapIsAList", R"({"weight_map":["a"]})", {"weight_map"}},
      {"TopIsAList", "[]", {"weight_map"}},
      {"Parent", map("../one.safetensors"), {"'a'", "in the folder of the index", "../one.safetensors"}},
      {"ParentOnly", map(".."), {"'a'", "in the folder of the index"}},
      {"Below", map("sub/one.safetensors"), {"'a'", "in the folder of the index"}},
      {"Absolute", map("/etc/passwd"), {"'a'", "in the folder of the index", "/etc/passwd"}},
      {"Backslash", map(R"(..\\one.safetensors)"), {"'a'", "in the folder of the index"}},
      {"NulByte", map(R"(one.safetensors\u0000)"), {"'a'", "in the folder of the index"}},
      {"EmptyName", map(""), {"'a'", "in the folder of the index"}},
      {"NumberAsName", R"({"weight_map":{"a":1}})", {"'a'", "name of a shard", "1"}},
      {"MissingFile", map("three.safetensors"), {"'a'", "three.safetensors", "no such file"}},
      {"NotInTheShard",
       R"({"weight_map":{"a":"two.safetensors"}})",
       {"two.safetensors", "'a'", "missing from this shard"}},
      {"BrokenShard", map("broken.safetensors"), {"broken.safetensors", "found 3"}},
      {"DuplicateTensor", R"({"weight_map":{"a":"one.safetensors","a":"two.safetensors"}})", {"'a'", "twice"}},
      {"NestingBomb", repeated("[", 100'000), {"nested deeper than 8"}},
  };
}

class ShardedSafetensors : public ::testing::TestWithParam<BadIndex> {
 protected:
  void SetUp() override {
    folder_.write("one.safetensors", file_of(object({tensor("a", "U8", "[2]", "[0,2]")}), 2));
    folder_.write("two.safetensors",
                  file_of(object({tensor("b", "U8", "[3]", "[0,3]"), tensor("unlisted", "U8", "[1]", "[3,4]")}), 4));
    folder_.write("broken.safetensors", "abc");
  }
  TempFolder folder_;
};

TEST_P(ShardedSafetensors, BadIndexIsRefused) {
  const std::string message = error_of(folder_.write("m.safetensors.index.json", GetParam().json));
  EXPECT_NE(message.find(folder_.path()), std::string::npos) << message;
  for (const std::string& part : GetParam().expected)
    EXPECT_NE(message.find(part), std::string::npos) << part << " in: " << message;
}

INSTANTIATE_TEST_SUITE_P(Cases, ShardedSafetensors, ::testing::ValuesIn(bad_indexes()),
                         [](const auto& tested) { return std::string(tested.param.name); });

TEST(Safetensors, OpensShardsFromAModelFolder) {
  const TempFolder folder;
  folder.write("m-1.safetensors", file_of(object({tensor("a", "U8", "[2]", "[0,2]")}), 2));
  folder.write("m-2.safetensors", file_of(object({tensor("b", "U8", "[1,3]", "[0,3]")}), 3));
  folder.write("m.safetensors.index.json",
               R"({"metadata":{"total_size":5},"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}})");
  const TensorFile file = TensorFile::open_in(folder.path(), "m");
  EXPECT_EQ(file.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(file.get("b", {1, 3}).data<std::uint8_t>()[2], 2);
  EXPECT_EQ(file.parameters(), 5);
  // One file is taken before shards.
  folder.write("m.safetensors", file_of("{}", 0));
  EXPECT_TRUE(TensorFile::open_in(folder.path(), "m").names().empty());
}

TEST(Safetensors, ModelFolderWithoutWeights) {
  const TempFolder folder;
  try {
    TensorFile::open_in(folder.path(), "vae");
    FAIL() << "accepted";
  } catch (const Error& failure) {
    const std::string message = failure.what();
    for (const std::string& part :
         {folder.path(), std::string("vae.safetensors.index.json"), std::string("spiece.model")})
      EXPECT_NE(message.find(part), std::string::npos) << message;
  }
}

/// A file of these tensors: bytes in the order they are given.
std::string packed(const std::vector<std::pair<std::string, Tensor>>& tensors) {
  std::vector<std::string> members;
  std::string data;
  for (const auto& [name, value] : tensors) {
    const std::size_t begin = data.size();
    data.append(static_cast<const char*>(value.raw()), value.bytes());
    members.push_back(
        tensor(name, name_of(value.dtype()), to_string(value.shape()), fmt::format("[{},{}]", begin, data.size())));
  }
  const std::string header = object(members);
  return little_endian(header.size()) + header + data;
}

/// Rounded to nearest with the row's largest magnitude at 127.
std::pair<Tensor, Tensor> quantized(const Tensor& w) {
  Tensor q = Tensor::empty(DType::i8, w.shape()), scale = Tensor::empty(DType::f32, {w.dim(0)});
  const std::int64_t each = w.size() / w.dim(0);
  for (std::int64_t o = 0; o < w.dim(0); ++o) {
    float largest = 0;
    for (std::int64_t i = 0; i < each; ++i) largest = std::max(largest, std::abs(w.data<float>()[o * each + i]));
    scale.data<float>()[o] = largest / 127;
    for (std::int64_t i = 0; i < each; ++i)
      q.data<std::int8_t>()[o * each + i] =
          static_cast<std::int8_t>(largest > 0 ? std::lround(w.data<float>()[o * each + i] / (largest / 127)) : 0);
  }
  return {q, scale};
}

TEST(Safetensors, WidensInt8WeightsByTheirScales) {
  const TempFolder folder;
  for (const Shape& shape : {Shape{7, 33}, {1, 5}, {300, 129}, {5, 3, 3, 2}, {4, 0}}) {
    Tensor w = testing::random_tensor(shape, 11);
    if (shape[1] > 0) w.data<float>()[0] = -3.5F;
    const auto [q, scale] = quantized(w);
    const std::string path =
        folder.write("w.safetensors", packed({{"w.scale", scale}, {"w", q}, {"b", testing::random_tensor({3}, 2)}}));
    const TensorFile file = TensorFile::open(path);
    for (const Tensor& got : {file.get("w"), file.get("w", shape), file.f32("w", shape)}) {
      ASSERT_EQ(got.dtype(), DType::f32);
      ASSERT_EQ(got.shape(), shape);
      const std::int64_t each = got.size() / shape[0];
      for (std::int64_t i = 0; i < got.size(); ++i) {
        const float step = scale.data<float>()[i / each];
        ASSERT_EQ(got.data<float>()[i], step * static_cast<float>(q.data<std::int8_t>()[i]));
        ASSERT_LE(std::abs(got.data<float>()[i] - w.data<float>()[i]), 0.5001F * step);
      }
    }
    EXPECT_EQ(file.parameters(), w.size() + 3) << "scales are no parameters";
    EXPECT_EQ(file.bytes_of("w"), w.size() + 4 * shape[0]);
    EXPECT_EQ(file.bytes_of("b"), 12);
  }
}

TEST(Safetensors, Int8WithoutScalesIsPlainNumbers) {
  const TempFolder folder;
  Tensor q = Tensor::empty(DType::i8, {2, 2});
  for (int i = 0; i < 4; ++i) q.data<std::int8_t>()[i] = static_cast<std::int8_t>(50 * i - 100);
  const TensorFile file = TensorFile::open(folder.write("w.safetensors", packed({{"w", q}})));
  EXPECT_EQ(file.get("w").dtype(), DType::i8);
  EXPECT_EQ(file.f32("w", {2, 2}).data<float>()[0], -100);
  // Of one dimension, and beside weights of another type, a scale is a tensor like others.
  const Tensor line = q.reshaped({4}), half = testing::random_tensor({2, 2}, 1), scale = testing::random_tensor({4}, 3);
  const TensorFile others = TensorFile::open(
      folder.write("o.safetensors", packed({{"a", line}, {"a.scale", scale}, {"b", half}, {"b.scale", scale}})));
  EXPECT_EQ(others.get("a").dtype(), DType::i8);
  EXPECT_EQ(others.get("b").data<float>()[1], half.data<float>()[1]);
  EXPECT_EQ(others.parameters(), 16);
}

TEST(Safetensors, Fp8WeightsComeWidenedOrAsTheyAreKept) {
  const TempFolder folder;
  for (const Shape& shape : {Shape{7, 33}, {16, 32}, {4, 0}, {5, 3, 2}}) {
    const Tensor kept =
        e4m3_rows(testing::random_tensor({shape[0], Tensor::zeros(DType::u8, shape).size() / shape[0]}, 4));
    const Tensor numbers(const_cast<void*>(kept.raw()), DType::e4m3, shape, nullptr);
    const Tensor scale(const_cast<float*>(scales_of(kept)), DType::f32, {shape[0]}, nullptr);
    const TensorFile file =
        TensorFile::open(folder.write("w.safetensors", packed({{"w.scale", scale}, {"w", numbers}})));
    const Tensor wide = file.get("w", shape);
    ASSERT_EQ(wide.dtype(), DType::f32);
    ASSERT_EQ(wide.shape(), shape);
    EXPECT_EQ(testing::max_difference(wide, kept.to(DType::f32)), 0);
    EXPECT_EQ(file.parameters(), wide.size()) << "scales are no parameters";
    EXPECT_EQ(file.bytes_of("w"), wide.size() + 4 * shape[0]);
    EXPECT_EQ(file.keeps_e4m3(), shape.size() == 2);
    const Tensor narrow = file.narrow("w", shape);
    EXPECT_EQ(narrow.dtype(), shape.size() == 2 ? DType::e4m3 : DType::f32);
    EXPECT_EQ(testing::max_difference(narrow, wide), 0);
    if (shape.size() == 2 && wide.size() > 0) {
      EXPECT_EQ(std::memcmp(narrow.raw(), kept.raw(), kept.bytes()), 0);
      EXPECT_EQ(std::memcmp(scales_of(narrow), scales_of(kept), scale.bytes()), 0);
    }
    EXPECT_THROW((void)file.narrow("w", {1, 2}), Error);
  }
}

TEST(Safetensors, Fp8WithoutScalesIsPlainNumbers) {
  const TempFolder folder;
  Tensor numbers = Tensor::empty(DType::e4m3, {2, 2});
  const std::uint8_t codes[] = {0x38, 0xc0, 0x7e, 0x01};
  std::memcpy(numbers.raw(), codes, 4);
  const TensorFile file =
      TensorFile::open(folder.write("w.safetensors", packed({{"w", numbers}, {"line", numbers.reshaped({4})}})));
  for (const Tensor& got : {file.get("w"), file.get("line"), file.narrow("w", {2, 2}), file.f32("line", {4})}) {
    ASSERT_EQ(got.dtype(), DType::f32);
    const std::vector<float> found(got.data<float>(), got.data<float>() + 4);
    EXPECT_EQ(found, (std::vector<float>{1, -2, 448, 0x1p-9F}));
  }
  EXPECT_FALSE(file.keeps_e4m3());
}

TEST(Safetensors, RefusesScalesThatDoNotFit) {
  const TempFolder folder;
  const Tensor q = Tensor::zeros(DType::i8, {3, 2});
  const auto refusal = [&](const Tensor& scale) -> std::string {
    const TensorFile file = TensorFile::open(folder.write("w.safetensors", packed({{"w", q}, {"w.scale", scale}})));
    try {
      (void)file.get("w", {3, 2});
    } catch (const Error& failure) {
      return failure.what();
    }
    return "accepted";
  };
  const auto expect = [&](const Tensor& scale, const std::vector<std::string>& words) {
    const std::string text = refusal(scale);
    for (const std::string& word : words) EXPECT_NE(text.find(word), std::string::npos) << text;
  };
  expect(Tensor::zeros(DType::f32, {2}), {"w.safetensors", "w.scale", "F32 [3]", "found F32 [2]"});
  expect(Tensor::zeros(DType::f32, {3, 1}), {"F32 [3]", "[3, 1]"});
  expect(Tensor::zeros(DType::bf16, {3}), {"F32 [3]", "BF16"});
  expect(Tensor::from({1, INFINITY, 1}, {3}), {"scale 1", "finite"});
  expect(Tensor::from({1, 1, NAN}, {3}), {"scale 2", "finite"});
  EXPECT_EQ(refusal(Tensor::from({1, 0, -1}, {3})), "accepted");
  const Tensor floats(const_cast<void*>(q.raw()), DType::e4m3, {3, 2}, nullptr);
  const auto narrow = [&](const Tensor& scale) -> std::string {
    const TensorFile file =
        TensorFile::open(folder.write("f.safetensors", packed({{"w", floats}, {"w.scale", scale}})));
    try {
      (void)file.narrow("w", {3, 2});
    } catch (const Error& failure) {
      return failure.what();
    }
    return "accepted";
  };
  EXPECT_NE(narrow(Tensor::zeros(DType::f32, {2})).find("scales of a weight of fp8, F32 [3], found F32 [2]"),
            std::string::npos);
  EXPECT_NE(narrow(Tensor::from({1, NAN, 1}, {3})).find("scale 1 is not a finite number"), std::string::npos);
  EXPECT_EQ(narrow(Tensor::from({1, 2, 3}, {3})), "accepted");
}

TEST(Safetensors, OpensTheBundledModel) {
  const std::string folder = testing::models_dir() + "/emoji";
  const TensorFile file = TensorFile::open_in(folder, "transformer");
  EXPECT_EQ(file.get("pos_start").shape(), (Shape{1, 1, 256}));
  EXPECT_GT(file.parameters(), 1'000'000);
}

// Every prefix of a good file, and single flipped bits of its header: refused or accepted, never a crash.
TEST(Safetensors, CutAndFlippedFiles) {
  const TempFolder folder;
  const std::string good =
      file_of(object({tensor("a", "F32", "[2]", "[0,8]"), tensor("b", "F64", "[1]", "[8,16]")}), 16);
  for (std::size_t size = 0; size < good.size(); ++size)
    EXPECT_NE(error_of(folder.write("cut.safetensors", good.substr(0, size))), "accepted") << size;
  for (std::size_t bit = 0; bit < (good.size() - 16) * 8; ++bit) {
    std::string flipped = good;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    EXPECT_FALSE(error_of(folder.write("flipped.safetensors", flipped)).empty());
  }
  EXPECT_EQ(error_of(folder.write("good.safetensors", good)), "accepted");
}

}  // namespace
}  // namespace sparvar
