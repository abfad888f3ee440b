#include "weights/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <optional>

#include "core/e4m3.h"
#include "core/open_file.h"
#include "sparvar/error.h"
#include "weights/int8.h"
#include "weights/shards.h"
#include "weights/strict_json.h"

namespace sparvar {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

constexpr std::uint64_t kMaxHeader = 100'000'000;  // the limit of the format's own reader
constexpr int kMaxDepth = 8;
constexpr int kMaxRank = 16;
constexpr const char* kScaleSuffix = ".scale";

Error bad(const std::string& path, const std::string& what) { return {ErrorKind::input, path + ": " + what}; }
Error bad_tensor(const std::string& path, const std::string& name, const std::string& what) {
  return bad(path, fmt::format("tensor {}: {}", quoted_name(name), what));
}

std::optional<DType> dtype_of(const std::string& name) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64, DType::i8, DType::u8, DType::i16,
                            DType::i32, DType::i64, DType::boolean, DType::e4m3})
    if (name == name_of(dtype)) return dtype;
  return std::nullopt;
}

/// What the header says of one tensor; offsets count from the first byte of the data.
struct Entry {
  std::string name;
  DType dtype = DType::f32;
  Shape shape;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

/// One file whose header is being checked.
struct Header {
  std::string path;
  std::uint64_t data_begin = 0;  // in the file
  std::uint64_t data_bytes = 0;
};

const nlohmann::json& member(const Header& header, const std::string& name, const nlohmann::json& value,
                             const char* key) {
  const auto found = value.find(key);
  if (found == value.end()) throw bad_tensor(header.path, name, fmt::format("expected the key '{}', found none", key));
  return *found;
}

DType read_dtype(const Header& header, const std::string& name, const nlohmann::json& value) {
  if (!value.is_string()) throw bad_tensor(header.path, name, "expected dtype as text, found " + describe(value));
  const auto& text = value.get_ref<const std::string&>();
  if (const std::optional<DType> dtype = dtype_of(text)) return *dtype;
  throw bad_tensor(header.path, name,
                   fmt::format("unknown dtype {}, expected F64, F32, F16, BF16, F8_E4M3, I64, I32, I16, I8, U8 or BOOL",
                               quoted_name(text)));
}

Shape read_shape(const Header& header, const std::string& name, const nlohmann::json& value) {
  if (!value.is_array() || value.size() > kMaxRank)
    throw bad_tensor(header.path, name,
                     fmt::format("expected a shape of at most {} dimensions, found {}", kMaxRank, describe(value)));
  Shape shape;
  for (const nlohmann::json& extent : value) {
    if (!extent.is_number_unsigned() || extent.get<std::uint64_t>() > std::numeric_limits<std::int64_t>::max())
      throw bad_tensor(header.path, name,
                       "expected dimensions that are whole numbers from 0, found " + describe(extent));
    shape.push_back(extent.get<std::int64_t>());
  }
  return shape;
}

/// Bytes of a tensor, or nothing where the product leaves 64 bits.
std::optional<std::uint64_t> checked_bytes(const Shape& shape, DType dtype) {
  std::uint64_t bytes = size_of(dtype);
  for (const std::int64_t extent : shape)
    if (__builtin_mul_overflow(bytes, static_cast<std::uint64_t>(extent), &bytes)) return std::nullopt;
  return bytes;
}

void read_span(const Header& header, const nlohmann::json& value, Entry& entry) {
  if (!value.is_array() || value.size() != 2 || !value[0].is_number_unsigned() || !value[1].is_number_unsigned())
    throw bad_tensor(header.path, entry.name,
                     "expected data_offsets of two whole numbers from 0, found " + describe(value));
  entry.begin = value[0].get<std::uint64_t>();
  entry.end = value[1].get<std::uint64_t>();
  const std::string span = fmt::format("data_offsets [{}, {}]", entry.begin, entry.end);
  if (entry.begin > entry.end) throw bad_tensor(header.path, entry.name, span + " end before they begin");
  if (entry.end > header.data_bytes)
    throw bad_tensor(
        header.path, entry.name,
        fmt::format("{} pass the end of the file: expected at most {} bytes of data (was the file cut short?)", span,
                    header.data_bytes));
  const std::optional<std::uint64_t> bytes = checked_bytes(entry.shape, entry.dtype);
  if (!bytes)
    throw bad_tensor(header.path, entry.name,
                     fmt::format("shape {} has more elements than 64 bits can count", to_string(entry.shape)));
  if (*bytes != entry.end - entry.begin)
    throw bad_tensor(header.path, entry.name,
                     fmt::format("{} {} needs {} bytes, found {} of {} bytes", name_of(entry.dtype),
                                 to_string(entry.shape), *bytes, span, entry.end - entry.begin));
}

Entry read_entry(const Header& header, const std::string& name, const nlohmann::json& value) {
  if (!value.is_object()) throw bad_tensor(header.path, name, "expected an object, found " + describe(value));
  Entry entry;
  entry.name = name;
  entry.dtype = read_dtype(header, name, member(header, name, value, "dtype"));
  entry.shape = read_shape(header, name, member(header, name, value, "shape"));
  read_span(header, member(header, name, value, "data_offsets"), entry);
  return entry;
}

void check_metadata(const Header& header, const nlohmann::json& value) {
  const bool texts =
      value.is_object() && std::all_of(value.begin(), value.end(), [](const auto& v) { return v.is_string(); });
  if (!texts) throw bad(header.path, "expected '__metadata__' to map names to texts, found " + describe(value));
}

/// Every byte of the data belongs to exactly one tensor.
void check_cover(const Header& header, std::vector<Entry>& entries) {
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  std::uint64_t position = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != position)
      throw bad_tensor(header.path, entry.name,
                       fmt::format("expected data from byte {}, found byte {}: the tensors {}", position, entry.begin,
                                   entry.begin < position ? "overlap" : "leave a hole"));
    position = entry.end;
  }
  if (position != header.data_bytes)
    throw bad(header.path, fmt::format("expected {} bytes of data, found {}: bytes follow the last tensor", position,
                                       header.data_bytes));
}

/// The length and place of the header; nothing is read past the file.
Header locate(const std::string& path, const std::byte* bytes, std::uint64_t size) {
  if (size < 8)
    throw bad(path, fmt::format("{}: expected a safetensors file of at least 8 bytes, found {}",
                                size == 0 ? "empty" : "too short", size));
  std::uint64_t length = 0;
  std::memcpy(&length, bytes, sizeof length);
  if (length > kMaxHeader)
    throw bad(path,
              fmt::format("header of {} bytes, expected at most {} (is this a safetensors file?)", length, kMaxHeader));
  if (length > size - 8)
    throw bad(path, fmt::format("header of {} bytes, but only {} follow (was the file cut short?)", length, size - 8));
  return {path, 8 + length, size - 8 - length};
}

std::vector<Entry> read_entries(const Header& header, const std::byte* bytes) {
  const std::string_view text(reinterpret_cast<const char*>(bytes) + 8, header.data_begin - 8);
  if (text.empty() || text.front() != '{') throw bad(header.path, "expected a safetensors header that begins with '{'");
  const nlohmann::json json = parse_json(text, header.path + ": header", kMaxDepth);
  std::vector<Entry> entries;
  for (const auto& [name, value] : json.items()) {
    if (name == "__metadata__")
      check_metadata(header, value);
    else
      entries.push_back(read_entry(header, name, value));
  }
  check_cover(header, entries);
  return entries;
}

/// A view of the mapped bytes, or a copy where they are not aligned for their type.
Tensor make_tensor(const Header& header, const Entry& entry, const std::shared_ptr<const std::byte>& map) {
  const std::byte* data = map.get() + header.data_begin + entry.begin;
  if (reinterpret_cast<std::uintptr_t>(data) % size_of(entry.dtype) == 0) {
    // The pages are read-only: Tensor has no constant form, and nobody writes to a weight.
    return {const_cast<std::byte*>(data), entry.dtype, entry.shape, map};
  }
  Tensor copy = Tensor::empty(entry.dtype, entry.shape);
  if (copy.bytes() > 0) std::memcpy(copy.raw(), data, copy.bytes());
  return copy;
}

std::map<std::string, Tensor> open_file(const std::string& path) {
  const OpenFile file(path);
  const std::shared_ptr<const std::byte> map = file.map();
  const Header header = locate(path, map.get(), file.size());
  std::map<std::string, Tensor> tensors;
  for (const Entry& entry : read_entries(header, map.get()))
    tensors.emplace(entry.name, make_tensor(header, entry, map));
  return tensors;
}

std::map<std::string, Tensor> open_shards(const std::string& path) {
  std::map<std::string, std::map<std::string, Tensor>> shards;
  std::map<std::string, Tensor> tensors;
  for (const auto& [name, shard] : read_shard_index(path)) {
    auto found = shards.find(shard);
    if (found == shards.end()) found = shards.emplace(shard, open_file(shard)).first;
    const auto tensor = found->second.find(name);
    if (tensor == found->second.end())
      throw bad_tensor(shard, name, fmt::format("missing from this shard, where {} says it is", path));
    tensors.emplace(name, tensor->second);
  }
  return tensors;
}

/// Numbers without a scale.
Tensor plain_e4m3(const Tensor& stored) {
  Tensor out = Tensor::empty(DType::f32, stored.shape());
  for (std::int64_t i = 0; i < out.size(); ++i) out.data<float>()[i] = e4m3_to_float(stored.data<std::uint8_t>()[i]);
  return out;
}

/// The scales behind the numbers, as DType::e4m3 says.
Tensor joined(const Tensor& numbers, const Tensor& scale) {
  Tensor out = Tensor::empty(DType::e4m3, numbers.shape());
  if (out.size() == 0) return out;
  std::memcpy(out.raw(), numbers.raw(), numbers.bytes());
  std::memcpy(scales_of(out), scale.raw(), scale.bytes());
  return out;
}

}  // namespace

TensorFile TensorFile::open(const std::string& path) {
  TensorFile file;
  file.path_ = path;
  file.tensors_ = path.ends_with(".json") ? open_shards(path) : open_file(path);
  return file;
}

TensorFile TensorFile::open_in(const std::string& dir, const std::string& stem) {
  const std::string single = (std::filesystem::path(dir) / (stem + ".safetensors")).string();
  const std::string index = single + ".index.json";
  std::error_code ignored;
  if (std::filesystem::exists(single, ignored)) return open(single);
  if (std::filesystem::exists(index, ignored)) return open(index);
  throw Error(ErrorKind::input,
              fmt::format("{}: found neither {}.safetensors nor {}.safetensors.index.json; a model folder holds "
                          "config.json, *.safetensors and spiece.model",
                          dir, stem, stem));
}

const Tensor& TensorFile::stored(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end())
    throw bad_tensor(path_, name, fmt::format("missing; the file has {} other tensors", tensors_.size()));
  return found->second;
}

const Tensor* TensorFile::scale_of(const std::string& name, const Tensor& weight) const {
  const auto found = tensors_.find(name + kScaleSuffix);
  const bool eight_bits = weight.dtype() == DType::i8 || weight.dtype() == DType::e4m3;
  if (!eight_bits || weight.rank() < 2 || found == tensors_.end()) return nullptr;
  const Tensor& scale = found->second;
  if (scale.dtype() != DType::f32 || scale.shape() != Shape{weight.dim(0)})
    throw bad_tensor(path_, found->first,
                     fmt::format("expected the scales of a weight of {}, F32 {}, found {} {}",
                                 weight.dtype() == DType::i8 ? "int8" : "fp8", to_string({weight.dim(0)}),
                                 name_of(scale.dtype()), to_string(scale.shape())));
  for (std::int64_t i = 0; i < scale.size(); ++i)
    if (!std::isfinite(scale.data<float>()[i]))
      throw bad_tensor(path_, found->first, fmt::format("scale {} is not a finite number", i));
  return &scale;
}

Tensor TensorFile::get(const std::string& name) const {
  const Tensor& tensor = stored(name);
  const Tensor* scale = scale_of(name, tensor);
  if (scale != nullptr) return widened(tensor, *scale);
  return tensor.dtype() == DType::e4m3 ? plain_e4m3(tensor) : tensor;
}

void TensorFile::check_shape(const std::string& name, const Tensor& tensor, const Shape& shape) const {
  if (tensor.shape() != shape)
    throw bad_tensor(path_, name,
                     fmt::format("expected shape {}, found {}", to_string(shape), to_string(tensor.shape())));
}

Tensor TensorFile::get(const std::string& name, const Shape& shape) const {
  check_shape(name, stored(name), shape);
  return get(name);
}

Tensor TensorFile::narrow(const std::string& name, const Shape& shape) const {
  const Tensor& tensor = stored(name);
  check_shape(name, tensor, shape);
  const Tensor* scale = scale_of(name, tensor);
  return scale != nullptr && tensor.dtype() == DType::e4m3 && tensor.rank() == 2 ? joined(tensor, *scale) : get(name);
}

bool TensorFile::keeps_e4m3() const {
  return std::any_of(tensors_.begin(), tensors_.end(), [&](const auto& entry) {
    return entry.second.dtype() == DType::e4m3 && entry.second.rank() == 2 && scale_of(entry.first, entry.second);
  });
}

Tensor TensorFile::f32(const std::string& name, const Shape& shape) const { return get(name, shape).to(DType::f32); }

std::vector<std::string> TensorFile::names() const {
  std::vector<std::string> names;
  names.reserve(tensors_.size());
  for (const auto& [name, tensor] : tensors_) names.push_back(name);
  return names;
}

std::int64_t TensorFile::bytes() const {
  std::int64_t sum = 0;
  for (const auto& [name, tensor] : tensors_) sum += static_cast<std::int64_t>(tensor.bytes());
  return sum;
}

std::int64_t TensorFile::bytes_of(const std::string& name) const {
  const Tensor& tensor = stored(name);
  const Tensor* scale = scale_of(name, tensor);
  return static_cast<std::int64_t>(tensor.bytes() + (scale != nullptr ? scale->bytes() : 0));
}

std::int64_t TensorFile::parameters() const {
  std::int64_t count = 0;
  for (const auto& [name, tensor] : tensors_) {
    count += tensor.size();
    if (const Tensor* scale = scale_of(name, tensor)) count -= scale->size();
  }
  return count;
}

}  // namespace sparvar
