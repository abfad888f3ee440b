// Checkpoints of torch.save: upstream's forms bit by bit, and files that are broken or hostile.
#include "weights/torch_file.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "sparvar/error.h"
#include "support.h"
#include "temp_folder.h"
#include "weights/checkpoint.h"
#include "weights/safetensors.h"
#include "zip_writer.h"

namespace sparvar {
namespace {

using testing::TempFolder;
using testing::torch_archive;
using testing::ZipWriter;

std::string formats() { return testing::data_dir() + "/checkpoint-formats/"; }

std::string file_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

void expect_equal(const Tensor& found, const Tensor& expected) {
  ASSERT_EQ(found.dtype(), expected.dtype());
  ASSERT_EQ(found.shape(), expected.shape());
  if (expected.bytes() > 0) {
    EXPECT_EQ(std::memcmp(found.raw(), expected.raw(), expected.bytes()), 0);
  }
}

/// The message of opening `bytes` as a checkpoint.
std::string refusal(const std::string& bytes) {
  const TempFolder folder;
  try {
    (void)TorchFile::open(folder.write("x.pth", bytes));
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::input);
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.what();
  }
  return "accepted";
}

template <std::size_t N>
std::string raw(const char (&text)[N]) {
  return {text, N - 1};  // with the zeros inside
}

std::string text(const std::string& value) { return std::string("\x8c") + static_cast<char>(value.size()) + value; }
std::string global(const std::string& module, const std::string& name) { return "c" + module + "\n" + name + "\n"; }

/// {"w": tensor} whose storage has `elements` f32.
struct TensorText {
  std::string storage_type = global("torch", "FloatStorage"), key = text("0"), elements = "K\6", offset = raw("K\0");
  std::string shape = "K\2K\3\x86", stride = "K\3K\1\x86", hooks = global("collections", "OrderedDict") + ")R";
  std::string tensor() const {
    return global("torch._utils", "_rebuild_tensor_v2") + "((" + text("storage") + storage_type + key + text("cpu") +
           elements + "tQ" + offset + shape + stride + "\x89" + hooks + "tR";
  }
  std::string pickle() const { return "\x80\2}(" + text("w") + tensor() + "u."; }
  std::string archive() const { return torch_archive(pickle(), std::string(24, '\1')); }
};

// ---- upstream's forms

TEST(TorchFile, EveryFormHoldsTheExpectedTensors) {
  const TensorFile expected = TensorFile::open(formats() + "expected.safetensors");
  // The nested ones hold some of them.
  for (const auto& [name, count] : std::map<std::string, std::size_t>{{"flat.pth", 12},
                                                                      {"nested_vae.pth", 8},
                                                                      {"nested_trainer.pth", 3},
                                                                      {"sharded_bin", 12},
                                                                      {"sharded_safetensors", 12},
                                                                      {"expected.safetensors", 12}}) {
    SCOPED_TRACE(name);
    const Checkpoint found = Checkpoint::open(formats() + name);
    EXPECT_EQ(found.names().size(), count);
    for (const std::string& tensor : found.names()) {
      SCOPED_TRACE(tensor);
      expect_equal(found.get(tensor), expected.get(tensor));
      EXPECT_EQ(found.shape(tensor), expected.get(tensor).shape());
      EXPECT_EQ(found.dtype(tensor), expected.get(tensor).dtype());
      EXPECT_EQ(found.bytes_of(tensor), static_cast<std::int64_t>(expected.get(tensor).bytes()));
      EXPECT_NO_THROW(found.verify(tensor));
    }
  }
}

TEST(TorchFile, SaysWhereTheStateDictWas) {
  EXPECT_EQ(Checkpoint::open(formats() + "flat.pth").place(), "");
  EXPECT_EQ(Checkpoint::open(formats() + "nested_vae.pth").place(), "vae");
  EXPECT_EQ(Checkpoint::open(formats() + "nested_trainer.pth").place(), "trainer.gpt_fsdp");
  try {
    (void)TorchFile::open(formats() + "nested_vae.pth", {"ema", "trainer.vae"});
    FAIL() << "there is neither";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("'vae'"), std::string::npos) << error.what();
  }
}

TEST(TorchFile, TensorsAreViewsOfTheMappedFileThatOutliveIt) {
  Tensor whole, slice, again;
  {
    const TorchFile file = TorchFile::open(formats() + "flat.pth");
    whole = file.get("view.whole");
    again = file.get("view.whole");
    slice = file.get("view.slice");
  }
  EXPECT_EQ(whole.raw(), again.raw()) << "a view";
  EXPECT_EQ(slice.data<float>()[0], whole.data<float>()[17]) << "a copy of what the strides pick";
  EXPECT_EQ(slice.data<float>()[1], whole.data<float>()[19]);
  EXPECT_EQ(slice.data<float>()[3], whole.data<float>()[25]);
}

TEST(TorchFile, WeightsInterface) {
  const TorchFile file = TorchFile::open(formats() + "flat.pth");
  EXPECT_TRUE(file.has("param"));
  EXPECT_FALSE(file.has("none"));
  EXPECT_THROW((void)file.get("none"), Error);
  EXPECT_THROW((void)file.get("param", {3, 2}), Error);
  EXPECT_EQ(file.f32("a.bf16", {4, 3}).dtype(), DType::f32);
  EXPECT_EQ(file.parameters(), 15 + 12 + 4 + 7 + 3 + 1 + 0 + 48 + 48 + 9 + 6 + 27);
}

TEST(TorchFile, AcceptsWhatStateDictsHoldBesideTensors) {
  const TensorText w;
  // An OrderedDict with _metadata, protocol 4 with frame and memo, integers of 8 bytes, a list, a float, None.
  const std::string metadata = "}" + text("_metadata") + global("collections", "OrderedDict") + ")Rsb";
  const std::string body = global("collections", "OrderedDict") + ")R\x94(" + text("w") + w.tensor() + text("step") +
                           raw("\x8a\5\0\0\0\0\1") + text("lr") + raw("G?\x1a\x36\xe2\xeb\x1c\x43\x2d") + text("list") +
                           "](K\1Ne" + "u" + metadata + ".";
  std::string frame = "\x95";
  for (int i = 0; i < 8; ++i) frame += i == 0 ? static_cast<char>(body.size()) : '\0';
  ASSERT_LT(body.size(), 256U);
  const TempFolder folder;
  const TorchFile file =
      TorchFile::open(folder.write("x.pth", torch_archive("\x80\4" + frame + body, std::string(24, '\1'))));
  EXPECT_EQ(file.names(), std::vector<std::string>{"w"});
  // Names put together on the stack.
  TensorText stacked;
  stacked.storage_type = text("torch.storage") + text("UntypedStorage") + "\x93";
  stacked.elements = "K\x18";
  const TorchFile bytes = TorchFile::open(folder.write("y.pth", stacked.archive()));
  EXPECT_EQ(bytes.dtype("w"), DType::u8);
}

// ---- hostile pickles: refused by name, and nothing runs

struct Hostile {
  const char* name;
  std::string pickle;
  std::vector<std::string> words;  // of the message
};

std::vector<Hostile> hostile_pickles() {
  const std::string start = "\x80\2";
  const std::string shell = "X\x0c\0\0\0touch /tmp/x";
  std::string deep = start;
  for (int i = 0; i < 5000; ++i) deep += '(';
  std::string bomb = start + "]q" + raw("\0");
  for (int i = 0; i < 64; ++i) bomb += raw("0(h\0h\0h\0h\0lq\0");  // four times as large each time, were it copied
  std::string itself = start + "}q" + raw("\0") + text("vae") + raw("h\0s.");
  std::string strings = start + "(";
  for (int i = 0; i < 100000; ++i) strings += ']';
  const std::string ordered = global("collections", "OrderedDict");
  TensorText twice;
  const std::string repeated = "\x80\2}(" + text("w") + twice.tensor() + text("w") + twice.tensor() + "u.";
  return {
      {"GLOBAL os.system",
       start + global("os", "system") + raw("X\2\0\0\0id\x85R."),
       {"GLOBAL", "'os.system'", "byte 2", "nothing was run"}},
      {"GLOBAL posix.system", start + global("posix", "system") + "(" + text("id") + "tR.", {"'posix.system'"}},
      {"GLOBAL builtins.eval", start + global("builtins", "eval") + ".", {"'builtins.eval'"}},
      {"GLOBAL of torch", start + global("torch", "load") + ".", {"'torch.load'"}},
      {"GLOBAL numpy", start + global("numpy.core.multiarray", "_reconstruct") + ".", {"numpy.core.multiarray"}},
      {"STACK_GLOBAL", "\x80\4" + text("os") + text("system") + "\x93.", {"STACK_GLOBAL", "'os.system'"}},
      {"a dotted name",
       "\x80\4" + text("collections") + text("OrderedDict.__init__.__globals__") + "\x93.",
       {"STACK_GLOBAL", "__globals__"}},
      {"INST", start + "(ios\nsystem\n.", {"INST", "not allowed"}},
      {"OBJ", start + "(" + ordered + "o.", {"OBJ"}},
      {"NEWOBJ", start + ordered + ")\x81.", {"NEWOBJ"}},
      {"NEWOBJ_EX", "\x80\4" + ordered + ")}\x92.", {"NEWOBJ_EX"}},
      {"EXT1", start + raw("\x82\1."), {"EXT1"}},
      {"EXT2", start + raw("\x83\1\0."), {"EXT2"}},
      {"EXT4", start + raw("\x84\1\0\0\0."), {"EXT4"}},
      {"PERSID", start + "P0\n.", {"PERSID"}},
      {"REDUCE of a text", start + text("f") + ")R.", {"REDUCE", "text"}},
      {"REDUCE of a storage", start + global("torch", "FloatStorage") + ")R.", {"REDUCE", "storage"}},
      {"REDUCE of OrderedDict with arguments", start + ordered + "]\x85R.", {"OrderedDict"}},
      {"BUILD on a tensor", start + "}" + text("w") + TensorText().tensor() + "}bs.", {"BUILD on a tensor"}},
      {"BUILD on a dict", start + "}}b.", {"BUILD on a dict"}},
      {"BUILD with a tuple", start + ordered + ")R)b.", {"BUILD"}},
      {"NEXT_BUFFER", "\x80\5\x97.", {"NEXT_BUFFER"}},
      {"no opcode", start + "\xff.", {"0xff is not an opcode"}},
      {"protocol 0", "(dp0\n.", {"protocol 2 to 5"}},
      {"protocol 9", "\x80\x09}.", {"protocol 9"}},
      {"nested too deep", deep, {"nested"}},
      {"a memo bomb", bomb + ".", {"holds a list"}},
      {"a dict that holds itself", itself, {"no dict of tensors"}},
      {"a mark that stays", strings + ".", {"values are left"}},
      {"LONG4 of 2 GB", start + raw("\x8b\xff\xff\xff\x7f\1."), {"2147483647 bytes", "follow"}},
      {"LONG4 of a negative length", start + raw("\x8b\0\0\0\x80\1."), {"negative"}},
      {"an integer of 200 bytes", start + "\x8a\xc8" + std::string(200, '\1') + ".", {"200 bytes"}},
      {"BINUNICODE8 of 2^64 bytes", "\x80\4\x8d\xff\xff\xff\xff\xff\xff\xff\xffx.", {"announces"}},
      {"a frame past the end", "\x80\4\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.", {"frame"}},
      {"POP of nothing", start + "0.", {"empty stack"}},
      {"GET of nothing", start + "h\7.", {"memo 7"}},
      {"TUPLE without a mark", start + "t.", {"mark"}},
      {"SETITEMS on a list", start + "](NNu.", {"SETITEMS on a list"}},
      {"a key without a value", start + "}(Nu.", {"key without a value"}},
      {"cut short", start + "}", {"no end"}},
      {"cut in a number", start + raw("J\1\0"), {"middle"}},
      {"bytes behind the end", start + "}.}", {"follow the end"}},
      {"values left", start + "N}.", {"left"}},
      {"text that is not UTF-8", start + raw("\x58\1\0\0\0\xff."), {"UTF-8"}},
      {"a number", start + "K\1.", {"holds a int"}},
      {"no tensors", start + "}" + text("a") + "Ns.", {"no dict of tensors", "'a'"}},
      {"a name twice", repeated, {"twice", "'w'"}},
  };
}

TEST(TorchFile, HostilePicklesAreRefusedByName) {
  for (const Hostile& hostile : hostile_pickles()) {
    SCOPED_TRACE(hostile.name);
    const std::string found = refusal(torch_archive(hostile.pickle, std::string(24, '\1')));
    EXPECT_NE(found.find("x.pth"), std::string::npos) << found;
    for (const std::string& word : hostile.words) EXPECT_NE(found.find(word), std::string::npos) << found;
  }
}

TEST(TorchFile, TensorsThatLeaveTheirStorageAreRefused) {
  EXPECT_EQ(refusal(TensorText().archive()), "accepted");
  const auto with = [](auto&& change) {
    TensorText tensor;
    change(tensor);
    return refusal(tensor.archive());
  };
  const auto has = [](const std::string& message, const char* word) {
    EXPECT_NE(message.find(word), std::string::npos) << message;
  };
  has(with([](auto& t) { t.offset = "K\1"; }), "pass its storage of 6 elements");
  has(with([](auto& t) { t.shape = "K\3K\3\x86"; }), "pass its storage");
  has(with([](auto& t) { t.stride = "K\x64K\1\x86"; }), "pass its storage");
  has(with([](auto& t) { t.offset = "J\xff\xff\xff\xff"; }), "is -1");
  has(with([](auto& t) { t.shape = "J\xfe\xff\xff\xffK\3\x86"; }), "is -2");
  has(with([](auto& t) { t.stride = "J\xfd\xff\xff\xffK\1\x86"; }), "is -3");
  has(with([](auto& t) { t.shape = "K\6\x85"; }), "strides");
  const std::string huge = raw("\x8a\x8\xff\xff\xff\xff\xff\xff\xff\x7f");
  has(with([&](auto& t) { t.shape = huge + huge + "\x86"; }), "pass its storage");
  has(with([&](auto& t) { t.stride = huge + huge + "\x86"; }), "pass its storage");
  has(with([&](auto& t) { t.offset = huge; }), "pass its storage");
  has(with([&](auto& t) { t.elements = huge; }), "said to hold");
  has(with([](auto& t) { t.shape = "K\xffK\xff\x86", t.stride = raw("K\0K\0\x86"); }), "repeats");
  has(with([](auto& t) { t.elements = "K\7"; }), "found 24 bytes");
  has(with([](auto& t) { t.key = text("1"); }), "not in the archive");
  has(with([](auto& t) { t.key = text("../data.pkl"); }), "not in the archive");
  has(with([](auto& t) { t.storage_type = global("torch.storage", "TypedStorage"); }), "no type");
  has(with([](auto& t) { t.storage_type = global("torch", "ComplexFloatStorage"); }), "'torch.ComplexFloatStorage'");
  has(with([](auto& t) { t.storage_type = global("collections", "OrderedDict"); }), "BINPERSID");
  has(with([](auto& t) { t.elements = "J\xff\xff\xff\xff"; }), "is -1");
  has(with([](auto& t) { t.hooks = "N}" + text("neg") + "\x88s"; }), "metadata");
}

// ---- archives

TEST(TorchFile, ArchivesThatAreBrokenAreRefused) {
  const auto has = [](const std::string& message, const char* word) {
    EXPECT_NE(message.find(word), std::string::npos) << message;
  };
  const std::string good = TensorText().archive();
  const auto changed = [&](std::size_t at, const std::string& to, std::string from) {
    from.replace(at, to.size(), to);
    return from;
  };
  const std::size_t directory = good.find("PK\1\2");
  has(refusal(""), "empty");
  has(refusal("hello"), "not a zip archive");
  has(refusal(raw("\x80\2\x8a\nl\xfc\x9c"
                  "F\xf9 j\xa8P\x19.")),
      "before 1.6");
  for (std::size_t length = 4; length < good.size(); length += 7)
    EXPECT_NE(refusal(good.substr(0, length)), "accepted") << length;
  has(refusal(ZipWriter().add("a/x", "1").bytes()), "data.pkl");
  has(refusal(ZipWriter().add("a/data.pkl", "\x80\2}.").add("b/data.pkl", "\x80\2}.").bytes()), "two entries");
  has(refusal(ZipWriter().add("a/data.pkl", "\x80\2}.").add("a/data.pkl", "\x80\2}.").bytes()), "twice");
  has(refusal(ZipWriter().add("a/data.pkl", "\x80\2}.").add("a/byteorder", "big").bytes()), "big-endian");
  has(refusal(changed(8, "\10", good)), "does not say what the directory says");
  has(refusal(changed(directory + 10, "\10", changed(8, "\10", good))), "compressed");
  has(refusal(changed(directory + 8, "\1", changed(6, "\1", good))), "encrypted");
  has(refusal(changed(directory + 24, "\xff\xff", changed(directory + 20, "\xff\xff", good))), "pass the directory");
  has(refusal(changed(30, "b", good)), "does not say what the directory says");
  has(refusal(changed(directory + 42, "\xff\xff\xff", good)), "not in front of the directory");
  has(refusal(changed(30 + 10 + 6, "?", good)), "checksum");
  // The second entry is the first one again.
  const std::size_t second = good.find("PK\1\2", directory + 1);
  std::string overlapping = good;
  overlapping.replace(second, 46 + 11, good.substr(directory, 46 + 10));
  EXPECT_NE(refusal(overlapping), "accepted");
  // A storage that was damaged on the way is found when it is read.
  const TempFolder folder;
  std::string damaged = good;
  damaged[good.find(std::string(24, '\1')) + 3] = '\2';
  const TorchFile file = TorchFile::open(folder.write("x.pth", damaged));
  EXPECT_THROW(file.verify("w"), Error);
}

TEST(TorchFile, Zip64AndSizesBehindTheDataAsTorchWritesThem) {
  // The fixture has both: see that they are looked at.
  const std::string good = file_bytes(formats() + "flat.pth");
  ASSERT_EQ(refusal(good), "accepted");
  for (const std::string mark : {"PK\6\6", "PK\6\7", "PK\7\10"}) {
    std::string broken = good;
    broken[good.find(mark) + 3] = '?';
    EXPECT_NE(refusal(broken), "accepted") << mark;
  }
  std::string broken = good;
  broken[good.find("PK\6\6") + 32] = 15;  // entries
  EXPECT_NE(refusal(broken).find("differ"), std::string::npos);
}

TEST(Checkpoint, FoldersThatAreNone) {
  const TempFolder folder;
  EXPECT_THROW((void)Checkpoint::open(folder.path("none")), Error);
  EXPECT_THROW((void)Checkpoint::open(folder.path()), Error);
  folder.write("a.pth", TensorText().archive());
  EXPECT_EQ(Checkpoint::open(folder.path()).names().size(), 1U) << "the only checkpoint of a folder";
  folder.write("b.pth", TensorText().archive());
  EXPECT_THROW((void)Checkpoint::open(folder.path()), Error) << "which of the two?";
  folder.write("pytorch_model.bin.index.json", R"({"weight_map": {"w": "../a.pth"}})");
  EXPECT_THROW((void)Checkpoint::open(folder.path()), Error) << "a shard elsewhere";
  folder.write("pytorch_model.bin.index.json", R"({"weight_map": {"v": "a.pth"}})");
  EXPECT_THROW((void)Checkpoint::open(folder.path()), Error) << "not in the shard";
  folder.write("pytorch_model.bin.index.json", R"({"weight_map": {"w": "a.pth"}})");
  EXPECT_EQ(Checkpoint::open(folder.path()).names().size(), 1U);
}

}  // namespace
}  // namespace sparvar
