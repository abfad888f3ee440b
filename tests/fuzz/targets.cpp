#include "fuzz/targets.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zlib.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "sparvar/attention_plan.h"
#include "sparvar/error.h"
#include "sparvar/image.h"
#include "text/tokenizer.h"
#include "weights/config.h"
#include "weights/safetensors.h"
#include "weights/torch_file.h"
#include "zip_writer.h"

namespace sparvar::fuzz {
namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  fmt::print(stderr, "does not hold: {}\n", what);
  std::abort();
}

/// Runs `read`; its Error must be one line for people.
template <typename Read>
void answer(Read&& read) {
  try {
    read();
  } catch (const Error& error) {
    const std::string text = error.what();
    require(!text.empty() && text.size() < 2000, "a message is short");
    require(text.find('\n') == std::string::npos, "a message is one line");
  }
}

/// A file in memory that holds the input, for readers that take a path.
class File {
 public:
  File() : descriptor_(::memfd_create("fuzz", MFD_CLOEXEC)), path_(fmt::format("/proc/self/fd/{}", descriptor_)) {
    require(descriptor_ >= 0, "there are files in memory");
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() { ::close(descriptor_); }
  const std::string& hold(Input input) const {
    require(::ftruncate(descriptor_, 0) == 0, "a file can be emptied");
    const auto size = static_cast<ssize_t>(input.size());
    require(::pwrite(descriptor_, input.data(), input.size(), 0) == size, "a file can be written");
    return path_;
  }

 private:
  int descriptor_;
  std::string path_;
};

std::string text_of(Input input) { return {reinterpret_cast<const char*>(input.data()), input.size()}; }

volatile std::uint8_t sink;

void read_one_image(Input input) {
  static const File file;
  answer([&] {
    const Image image = sparvar::read_image(file.hold(input));
    require(image.width > 0 && image.height > 0, "a picture has pixels");
    require(image.rgb.size() == static_cast<std::size_t>(image.width) * static_cast<std::size_t>(image.height) * 3,
            "three bytes a pixel");
  });
}

/// Opens a checkpoint and reads all that it holds.
void read_torch(const std::string& path) {
  answer([&] {
    const TorchFile file = TorchFile::open(path);
    for (const std::string& name : file.names()) {
      const Tensor tensor = file.get(name);
      require(tensor.shape() == file.shape(name) && tensor.dtype() == file.dtype(name), "a tensor is what was said");
      require(static_cast<std::int64_t>(tensor.bytes()) == file.bytes_of(name), "a tensor has the bytes of its shape");
      const auto* bytes = static_cast<const std::uint8_t*>(tensor.raw());
      for (std::size_t i = 0; i < tensor.bytes(); ++i) sink = bytes[i];
    }
    for (const std::string& name : file.names()) file.verify(name);
  });
}

/// Puts the right checksum behind every whole chunk; false where all were right.
bool repair_png(std::vector<std::uint8_t>& bytes) {
  bool changed = false;
  for (std::size_t at = 8; at + 12 <= bytes.size();) {
    std::size_t length = 0;
    for (int i = 0; i < 4; ++i) length = length << 8 | bytes[at + i];
    if (length > bytes.size() - at - 12) break;
    const std::uint32_t sum =
        static_cast<std::uint32_t>(crc32(0, bytes.data() + at + 4, static_cast<uInt>(length + 4)));
    for (int i = 0; i < 4; ++i) {
      std::uint8_t& byte = bytes[at + 8 + length + i];
      const auto right = static_cast<std::uint8_t>(sum >> (24 - 8 * i));
      changed |= byte != right;
      byte = right;
    }
    at += 12 + length;
  }
  return changed;
}

}  // namespace

void read_safetensors(Input input) {
  static const File file;
  answer([&] {
    const TensorFile tensors = TensorFile::open(file.hold(input));
    for (const std::string& name : tensors.names()) {
      const Tensor& tensor = tensors.get(name);
      const auto* bytes = static_cast<const std::uint8_t*>(tensor.raw());
      for (std::size_t i = 0; i < tensor.bytes(); ++i) sink = bytes[i];
      (void)tensors.f32(name, tensor.shape());
      (void)tensors.narrow(name, tensor.shape());
    }
  });
}

void read_config(Input input) {
  answer([&] {
    const ModelConfig config = parse_model_config(text_of(input), "config.json");
    require(!config.schedule.empty() && config.transformer.head_dim() > 0, "an accepted config is complete");
  });
}

void read_plan(Input input) {
  answer([&] {
    const AttentionPlan plan = AttentionPlan::from_json(text_of(input), "plan.json");
    plan.validate();
    require(AttentionPlan::from_json(plan.to_json(), "again") == plan, "a plan survives being written and read");
  });
}

void tokenize_prompt(Input input) {
  static const Tokenizer tokenizer(SPARVAR_MODELS "/emoji/spiece.model", 100);
  answer([&] {
    constexpr int kLongest = 64;
    const std::vector<std::int32_t> ids = tokenizer.encode(text_of(input), kLongest);
    require(!ids.empty() && ids.size() <= kLongest, "1 to 64 ids");
    for (const std::int32_t id : ids) require(id >= 0 && id < tokenizer.vocabulary(), "an id is in the vocabulary");
  });
}

void read_image(Input input) {
  read_one_image(input);
  // A mutated chunk has a wrong checksum, which hides what lies behind it.
  std::vector<std::uint8_t> repaired(input.begin(), input.end());
  if (repair_png(repaired)) read_one_image(repaired);
}

void read_checkpoint(Input input) {
  static const File file;
  read_torch(file.hold(input));
}

void read_pickle(Input input) {
  static const File file;
  const std::string archive = testing::torch_archive(text_of(input), std::string(64, '\1'));
  read_torch(file.hold({reinterpret_cast<const std::uint8_t*>(archive.data()), archive.size()}));
}

}  // namespace sparvar::fuzz
