// Formats: numpy/lib/format.py (version 1.0) and PKWARE's APPNOTE, sections 4.3.7 (local header), 4.3.12 (directory),
// 4.3.16 (its end).
#include "weights/npz.h"

#include <fmt/format.h>
#include <zlib.h>

#include <limits>

#include "sparvar/error.h"

namespace sparvar {
namespace {

using Bytes = std::vector<std::uint8_t>;

void put(Bytes& to, std::uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i, value >>= 8) to.push_back(static_cast<std::uint8_t>(value));
}

void put(Bytes& to, const std::string& text) { to.insert(to.end(), text.begin(), text.end()); }

const char* numpy_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "<f4";
    case DType::f64:
      return "<f8";
    case DType::f16:
      return "<f2";
    case DType::i8:
      return "|i1";
    case DType::u8:
      return "|u1";
    case DType::i16:
      return "<i2";
    case DType::i32:
      return "<i4";
    case DType::i64:
      return "<i8";
    case DType::boolean:
      return "|b1";
    default:
      throw Error(ErrorKind::usage, fmt::format("NumPy has no type for {}", name_of(dtype)));
  }
}

Bytes npy(const Tensor& tensor) {
  std::string shape;
  for (const std::int64_t n : tensor.shape()) shape += fmt::format("{},", n);
  std::string header =
      fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}), }}", numpy_type(tensor.dtype()), shape);
  constexpr std::size_t kPreamble = 10;  // magic, version, length
  header.append(63 - (kPreamble + header.size()) % 64, ' ');
  header += '\n';
  Bytes bytes;
  bytes.reserve(kPreamble + header.size() + tensor.bytes());
  put(bytes, "\x93NUMPY");
  put(bytes, 1, 2);  // version 1.0
  put(bytes, header.size(), 2);
  put(bytes, header);
  const auto* data = static_cast<const std::uint8_t*>(tensor.raw());
  bytes.insert(bytes.end(), data, data + tensor.bytes());
  return bytes;
}

/// The part that a file's own header and its entry in the directory share.
void put_entry(Bytes& to, std::uint32_t crc, std::size_t size, std::size_t name) {
  put(to, 20, 2);  // version needed
  put(to, 0, 2);   // flags
  put(to, 0, 2);   // stored
  put(to, 0, 2);   // time: midnight,
  put(to, 33, 2);  // date: 1 January 1980, so that equal arrays make equal files
  put(to, crc, 4);
  put(to, size, 4);
  put(to, size, 4);
  put(to, name, 2);
  put(to, 0, 2);  // extra field
}

}  // namespace

std::vector<std::uint8_t> npz_bytes(const std::vector<std::pair<std::string, Tensor>>& arrays) {
  Bytes zip, directory;
  for (const auto& [name, tensor] : arrays) {
    const std::string file = name + ".npy";
    const Bytes content = npy(tensor);
    if (zip.size() + content.size() > std::numeric_limits<std::uint32_t>::max() - (1U << 20))
      throw Error(ErrorKind::usage, "these arrays are larger than the 4 GiB that an .npz file can hold");
    const auto crc = static_cast<std::uint32_t>(crc32(0, content.data(), static_cast<uInt>(content.size())));
    put(directory, 0x02014B50, 4);
    put(directory, 20, 2);  // version made by
    put_entry(directory, crc, content.size(), file.size());
    put(directory, 0, 2 + 2 + 2 + 4);  // comment, disk, attributes
    put(directory, zip.size(), 4);
    put(directory, file);
    put(zip, 0x04034B50, 4);
    put_entry(zip, crc, content.size(), file.size());
    put(zip, file);
    zip.insert(zip.end(), content.begin(), content.end());
  }
  const std::size_t start = zip.size();
  zip.insert(zip.end(), directory.begin(), directory.end());
  put(zip, 0x06054B50, 4);
  put(zip, 0, 4);  // disks
  put(zip, arrays.size(), 2);
  put(zip, arrays.size(), 2);
  put(zip, directory.size(), 4);
  put(zip, start, 4);
  put(zip, 0, 2);  // comment
  return zip;
}

}  // namespace sparvar
