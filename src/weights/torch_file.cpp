#include "weights/torch_file.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string_view>

#include "core/open_file.h"
#include "sparvar/error.h"
#include "weights/pickle.h"
#include "weights/strict_json.h"

namespace sparvar {
namespace {

using Kind = PickleValue::Kind;

constexpr std::size_t kNamesInMessage = 8;

Error bad(const std::string& path, const std::string& what) { return {ErrorKind::input, path + ": " + what}; }

/// What the file is if it is no zip archive, for the message.
void check_form(const std::string& path) {
  const OpenFile file(path);
  const std::shared_ptr<const std::byte> map = file.map();
  const std::string_view head(reinterpret_cast<const char*>(map.get()), std::min<std::uint64_t>(file.size(), 512));
  if (head.starts_with("PK\3\4")) return;
  if (head.starts_with("\x80") || (head.size() >= 262 && head.substr(257, 5) == "ustar"))
    throw bad(
        path,
        "written in the form that PyTorch had before 1.6; save it again where PyTorch is installed: python -c "
        "\"import torch, sys; torch.save(torch.load(sys.argv[1], 'cpu', weights_only=True), sys.argv[2])\" OLD NEW");
  throw bad(path, fmt::format("{}: expected a checkpoint of torch.save (a zip archive)",
                              head.empty() ? "empty" : "not a zip archive"));
}

/// "x/" of the entry x/data.pkl, of which there is one.
std::string root_of(const ZipArchive& archive) {
  constexpr std::string_view kPickle = "data.pkl";
  std::optional<std::string> root;
  for (const auto& [name, entry] : archive.entries()) {
    const std::size_t slash = name.find('/');
    if (slash == std::string::npos || std::string_view(name).substr(slash + 1) != kPickle) continue;
    if (root) throw bad(archive.path(), "two entries are called data.pkl, expected one");
    root = name.substr(0, slash + 1);
  }
  if (!root) throw bad(archive.path(), "no entry NAME/data.pkl: not a checkpoint of torch.save");
  const ZipEntry* order = archive.find(*root + "byteorder");
  if (order == nullptr) return *root;
  const std::span<const std::byte> text = archive.bytes(*order);
  if (std::string_view(reinterpret_cast<const char*>(text.data()), text.size()) != "little")
    throw bad(archive.path(), "numbers are big-endian, expected little-endian");
  return *root;
}

std::vector<std::string_view> split(std::string_view place) {
  std::vector<std::string_view> parts;
  for (std::size_t dot = 0; dot != std::string_view::npos;) {
    dot = place.find('.');
    parts.push_back(place.substr(0, dot));
    place.remove_prefix(dot == std::string_view::npos ? place.size() : dot + 1);
  }
  return parts;
}

}  // namespace

std::vector<std::string> known_places() {
  return {"vae",
          "trainer.gpt_fsdp",
          "trainer.gpt_wo_ddp",
          "trainer.vae_local",
          "trainer.vae",
          "gpt_fsdp",
          "state_dict",
          "model",
          "module",
          "ema"};
}

/// One pickle on its way to tensors.
class TorchReader {
 public:
  TorchReader(TorchFile& file, std::string root, const Pickle& pickle)
      : file_(file), root_(std::move(root)), pickle_(pickle) {}

  void read(const std::vector<std::string>& places) {
    const PickleValue& root = pickle_.values[pickle_.root];
    if (root.kind != Kind::dict)
      throw bad(file_.path_, fmt::format("holds a {}, expected a dict of tensors", name_of(root.kind)));
    if (holds_tensors(root)) return take(root);
    for (const std::string& place : places) {
      const PickleValue* found = &root;
      for (const std::string_view part : split(place)) found = found == nullptr ? nullptr : member(*found, part);
      if (found == nullptr || found->kind != Kind::dict || !holds_tensors(*found)) continue;
      file_.place_ = place;
      return take(*found);
    }
    throw bad(file_.path_,
              fmt::format("no dict of tensors at {}; its keys are {}", fmt::join(places, ", "), keys(root)));
  }

 private:
  bool holds_tensors(const PickleValue& dict) const {
    for (std::size_t i = 1; i < dict.items.size(); i += 2)
      if (pickle_.values[dict.items[i]].kind == Kind::tensor) return true;
    return false;
  }

  /// The value of a text key, or null.
  const PickleValue* member(const PickleValue& dict, std::string_view key) const {
    if (dict.kind != Kind::dict) return nullptr;
    const PickleValue* found = nullptr;
    for (std::size_t i = 0; i + 1 < dict.items.size(); i += 2) {
      const PickleValue& candidate = pickle_.values[dict.items[i]];
      if (candidate.kind != Kind::text || candidate.text != key) continue;
      if (found != nullptr) throw bad(file_.path_, fmt::format("the key {} is there twice", quoted_name(key)));
      found = &pickle_.values[dict.items[i + 1]];
    }
    return found;
  }

  std::string keys(const PickleValue& dict) const {
    std::vector<std::string> names;
    for (std::size_t i = 0; i < dict.items.size() && names.size() < kNamesInMessage; i += 2) {
      const PickleValue& key = pickle_.values[dict.items[i]];
      names.push_back(key.kind == Kind::text ? quoted_name(key.text) : name_of(key.kind));
    }
    if (dict.items.size() / 2 > names.size()) names.emplace_back("...");
    return names.empty() ? "none" : fmt::format("{}", fmt::join(names, ", "));
  }

  /// Values that are no tensors (step counters) are left out.
  void take(const PickleValue& dict) {
    for (std::size_t i = 0; i + 1 < dict.items.size(); i += 2) {
      const PickleValue& key = pickle_.values[dict.items[i]];
      const PickleValue& value = pickle_.values[dict.items[i + 1]];
      if (value.kind != Kind::tensor) continue;
      if (key.kind != Kind::text)
        throw bad(file_.path_, fmt::format("the key of a tensor is a {}, expected a text", name_of(key.kind)));
      std::string name(key.text);
      TorchFile::Stored stored = checked(name, pickle_.tensors[static_cast<std::size_t>(value.number)]);
      if (!file_.tensors_.emplace(name, std::move(stored)).second) fail(name, "is there twice");
    }
  }

  [[noreturn]] void fail(const std::string& name, const std::string& what) const {
    throw bad(file_.path_, fmt::format("tensor {}: {}", quoted_name(name), what));
  }

  TorchFile::Stored checked(const std::string& name, const PickledTensor& tensor) const {
    if (!tensor.dtype) fail(name, "its storage says no type of number");
    TorchFile::Stored stored;
    stored.dtype = *tensor.dtype;
    stored.shape = tensor.shape;
    stored.stride = tensor.stride;
    stored.offset = tensor.offset;
    stored.entry = root_ + "data/" + std::string(tensor.storage);
    const ZipEntry* entry = file_.archive_->find(stored.entry);
    if (entry == nullptr) fail(name, fmt::format("its storage {} is not in the archive", quoted_name(stored.entry)));
    const std::uint64_t width = size_of(stored.dtype);
    std::uint64_t bytes = 0;
    if (__builtin_mul_overflow(static_cast<std::uint64_t>(tensor.storage_elements), width, &bytes) ||
        bytes != entry->size)
      fail(name, fmt::format("its storage is said to hold {} numbers of {} bytes, found {} bytes",
                             tensor.storage_elements, width, entry->size));
    check_reach(name, tensor);
    stored.contiguous = is_contiguous(tensor);
    return stored;
  }

  /// Offset, shape and strides stay in the storage; a tensor has no more elements than it (a hostile one could ask for
  /// terabytes of copies of one number).
  void check_reach(const std::string& name, const PickledTensor& tensor) const {
    std::int64_t elements = 1;
    std::int64_t last = tensor.offset;
    bool overflow = false;
    bool empty = false;
    for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
      const std::int64_t extent = tensor.shape[i];
      empty |= extent == 0;
      overflow |= __builtin_mul_overflow(elements, extent, &elements);
      std::int64_t reach = 0;
      overflow |= __builtin_mul_overflow(std::max<std::int64_t>(extent - 1, 0), tensor.stride[i], &reach) ||
                  __builtin_add_overflow(last, reach, &last);
    }
    if (empty && !overflow) return;
    if (overflow || last >= tensor.storage_elements)
      fail(name, fmt::format("offset {}, shape {} and strides {} pass its storage of {} elements", tensor.offset,
                             to_string(tensor.shape), to_string(tensor.stride), tensor.storage_elements));
    if (elements > tensor.storage_elements)
      fail(name, fmt::format("shape {} repeats numbers of its storage of {} elements, expected none twice",
                             to_string(tensor.shape), tensor.storage_elements));
  }

  static bool is_contiguous(const PickledTensor& tensor) {
    std::int64_t expected = 1;
    for (std::size_t i = tensor.shape.size(); i-- > 0;) {
      if (tensor.shape[i] == 0) return true;
      if (tensor.shape[i] != 1 && tensor.stride[i] != expected) return false;
      expected *= tensor.shape[i];
    }
    return true;
  }

  TorchFile& file_;
  std::string root_;
  const Pickle& pickle_;
};

TorchFile TorchFile::open(const std::string& path, const std::vector<std::string>& places) {
  check_form(path);
  TorchFile file;
  file.path_ = path;
  file.archive_ = std::make_shared<const ZipArchive>(ZipArchive::open(path));
  const std::string root = root_of(*file.archive_);
  file.archive_->verify(root + "data.pkl");
  const Pickle pickle =
      read_pickle(file.archive_->bytes(*file.archive_->find(root + "data.pkl")), path + ": " + root + "data.pkl");
  TorchReader(file, root, pickle).read(places);
  return file;
}

const TorchFile::Stored& TorchFile::stored(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end())
    throw bad(path_,
              fmt::format("tensor {}: missing; the file has {} other tensors", quoted_name(name), tensors_.size()));
  return found->second;
}

Tensor TorchFile::get(const std::string& name) const {
  const Stored& tensor = stored(name);
  const std::size_t width = size_of(tensor.dtype);
  const std::byte* storage = archive_->bytes(*archive_->find(tensor.entry)).data();
  std::int64_t elements = 1;
  for (const std::int64_t extent : tensor.shape) elements *= extent;
  if (elements == 0) return Tensor::empty(tensor.dtype, tensor.shape);
  const std::byte* data = storage + static_cast<std::size_t>(tensor.offset) * width;
  if (tensor.contiguous && reinterpret_cast<std::uintptr_t>(data) % width == 0)
    return {const_cast<std::byte*>(data), tensor.dtype, tensor.shape,
            archive_->mapping()};  // nobody writes to a weight
  Tensor copy = Tensor::empty(tensor.dtype, tensor.shape);
  auto* to = static_cast<std::byte*>(copy.raw());
  if (tensor.contiguous) {
    std::memcpy(to, data, copy.bytes());
    return copy;
  }
  Shape position(tensor.shape.size(), 0);
  std::int64_t from = 0;  // in elements, from `data`
  for (std::int64_t i = 0; i < elements; ++i) {
    std::memcpy(to + static_cast<std::size_t>(i) * width, data + static_cast<std::size_t>(from) * width, width);
    for (std::size_t axis = position.size(); axis-- > 0;) {
      from += tensor.stride[axis];
      if (++position[axis] < tensor.shape[axis]) break;
      from -= tensor.stride[axis] * tensor.shape[axis];
      position[axis] = 0;
    }
  }
  return copy;
}

Tensor TorchFile::get(const std::string& name, const Shape& shape) const {
  if (const Stored& tensor = stored(name); tensor.shape != shape)
    throw bad(path_, fmt::format("tensor {}: expected shape {}, found {}", quoted_name(name), to_string(shape),
                                 to_string(tensor.shape)));
  return get(name);
}

Tensor TorchFile::f32(const std::string& name, const Shape& shape) const { return get(name, shape).to(DType::f32); }

std::vector<std::string> TorchFile::names() const {
  std::vector<std::string> names;
  names.reserve(tensors_.size());
  for (const auto& [name, tensor] : tensors_) names.push_back(name);
  return names;
}

std::int64_t TorchFile::bytes_of(const std::string& name) const {
  const Stored& tensor = stored(name);
  auto bytes = static_cast<std::int64_t>(size_of(tensor.dtype));
  for (const std::int64_t extent : tensor.shape) bytes *= extent;
  return bytes;
}

std::int64_t TorchFile::parameters() const {
  std::int64_t count = 0;
  for (const auto& [name, tensor] : tensors_)
    count += bytes_of(name) / static_cast<std::int64_t>(size_of(tensor.dtype));
  return count;
}

void TorchFile::verify(const std::string& name) const { archive_->verify(stored(name).entry); }

}  // namespace sparvar
