#include "pipeline/convert_writer.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <span>
#include <system_error>

#include "core/e4m3.h"
#include "image/atomic_file.h"
#include "sparvar/error.h"
#include "weights/int8.h"

namespace sparvar {
namespace {

constexpr std::int64_t kPiece = 16 << 20;  // bytes of f32 at a time
constexpr std::int64_t kSmallestMatrix = 32;

bool is_float(DType type) {
  return type == DType::f32 || type == DType::bf16 || type == DType::f16 || type == DType::f64;
}

std::int64_t elements_of(const Shape& shape) {
  std::int64_t count = 1;
  for (const std::int64_t extent : shape) count *= extent;
  return count;
}

/// Small matrices, embeddings of scales, AdaLN terms and the position bias stay as they are: little is won, and their
/// errors reach everything (training/export.py has the same rule).
bool may_be_int8(const WantedTensor& tensor) {
  if (tensor.shape.size() != 2 || !tensor.name.ends_with(".weight")) return false;
  if (std::min(tensor.shape[0], tensor.shape[1]) < kSmallestMatrix) return false;
  for (const char* kept : {"lvl_embed", "ada_lin", "relative_attention_bias"})
    if (tensor.name.find(kept) != std::string::npos) return false;
  return true;
}

/// Those of LinearKind::narrow that a GPU would make e4m3 (models/infinity/block.cpp); a test compares the lists.
bool may_be_fp8(const WantedTensor& tensor) {
  if (tensor.shape.size() != 2 || !fits_e4m3(tensor.shape[0], tensor.shape[1])) return false;
  if (!tensor.name.starts_with("blocks.") && !tensor.name.starts_with("block_chunks.")) return false;
  for (const char* layer : {".sa.mat_qkv.weight", ".sa.proj.weight", ".ca.mat_q.weight", ".ca.mat_kv.weight",
                            ".ca.proj.weight", ".ffn.fc1.weight", ".ffn.fc2.weight"})
    if (tensor.name.ends_with(layer)) return true;
  return false;
}

std::vector<PlannedTensor> plan_tensor(const ConvertSource& source, const WantedTensor& wanted, ConvertType type) {
  using Form = PlannedTensor::Form;
  const DType given = source.checkpoint().dtype(source.original(wanted.name));
  if (!is_float(given))
    source.fail(wanted.name, fmt::format("expected floating-point numbers, found {}", name_of(given)));
  const auto with_scale = [&](Form numbers, DType kept, Form scale) -> std::vector<PlannedTensor> {
    return {{numbers, wanted.name, wanted.name, kept, wanted.shape},
            {scale, wanted.name + ".scale", wanted.name, DType::f32, {wanted.shape[0]}}};
  };
  if (type == ConvertType::int8 && may_be_int8(wanted)) return with_scale(Form::int8, DType::i8, Form::int8_scale);
  if (type == ConvertType::fp8 && may_be_fp8(wanted)) return with_scale(Form::fp8, DType::e4m3, Form::fp8_scale);
  const bool matrix = wanted.shape.size() >= 2 && wanted.name.ends_with(".weight");
  const bool narrow = type != ConvertType::f32 && (matrix || given == DType::bf16);
  return {{Form::plain, wanted.name, wanted.name, narrow ? DType::bf16 : DType::f32, wanted.shape}};
}

/// Lets go of the pages of a tensor that was written: they stay the file's, and come back if they are read again.
void page_out(const Tensor& tensor) {
#ifdef MADV_PAGEOUT
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<std::uintptr_t>(tensor.raw()) + page - 1) / page * page;
  const auto end = (reinterpret_cast<std::uintptr_t>(tensor.raw()) + tensor.bytes()) / page * page;
  if (end > begin) (void)::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_PAGEOUT);  // NOLINT
#else
  (void)tensor;
#endif
}

class FileWriter {
 public:
  FileWriter(const std::string& path, const PieceCounter& count) : writer_(path), count_(count) {}

  void write(const void* bytes, std::size_t size) {
    const std::span<const std::uint8_t> piece(static_cast<const std::uint8_t*>(bytes), size);
    if (!piece.empty()) writer_.write(piece);
    crc_ = static_cast<std::uint32_t>(::crc32_z(crc_, piece.data(), piece.size()));
    count_(static_cast<std::int64_t>(size));
  }
  void write(const Tensor& tensor) { write(tensor.raw(), tensor.bytes()); }
  std::uint32_t commit() {
    writer_.commit();
    return crc_;
  }

 private:
  AtomicWriter writer_;
  const PieceCounter& count_;
  std::uint32_t crc_ = static_cast<std::uint32_t>(::crc32_z(0, nullptr, 0));
};

Tensor finite_scales(const PlannedFile& file, const PlannedTensor& tensor, const Tensor& rows) {
  Tensor scales = row_scales(rows);
  for (std::int64_t i = 0; i < scales.size(); ++i)
    if (!std::isfinite(scales.data<float>()[i]))
      file.source->fail(tensor.source, "holds a number that is not finite: it cannot be kept as int8");
  return scales;
}

/// By way of bf16: what a GPU makes of the bf16 folder while it loads it.
Tensor finite_bf16(const PlannedFile& file, const PlannedTensor& tensor, const Tensor& rows) {
  const Tensor wide = (rows.dtype() == DType::bf16 ? rows : rows.to(DType::bf16)).to(DType::f32);
  for (std::int64_t i = 0; i < wide.size(); ++i)
    if (!std::isfinite(wide.data<float>()[i]))
      file.source->fail(tensor.source, "holds a number that is not finite: it cannot be kept as fp8");
  return wide;
}

/// A piece of whole rows, converted; of e4m3 the numbers are written, not the scales behind them.
Tensor converted(const PlannedFile& file, const PlannedTensor& tensor, const Tensor& rows) {
  using Form = PlannedTensor::Form;
  if (tensor.form == Form::plain) return rows.dtype() == tensor.dtype ? rows : rows.to(tensor.dtype);
  if (tensor.form == Form::fp8) return e4m3_rows(finite_bf16(file, tensor, rows));
  if (tensor.form == Form::fp8_scale) return e4m3_row_scales(finite_bf16(file, tensor, rows));
  const Tensor wide = rows.to(DType::f32);
  Tensor scales = finite_scales(file, tensor, wide);
  return tensor.form == Form::int8_scale ? scales : narrowed(wide, scales);
}

void write_tensor(const PlannedFile& file, const PlannedTensor& tensor, FileWriter& out) {
  const std::string& original = file.source->original(tensor.source);
  file.source->checkpoint().verify(original);
  const Tensor given = file.source->checkpoint().get(original);
  if (given.size() == 0) return;
  if (given.rank() == 0) return out.write(converted(file, tensor, given));
  const std::int64_t row = given.size() / given.dim(0) * 4;
  const std::int64_t step = std::max<std::int64_t>(1, kPiece / row);
  for (std::int64_t begin = 0; begin < given.dim(0); begin += step) {
    const Tensor rows = given.rows(begin, std::min(begin + step, given.dim(0)));
    out.write(converted(file, tensor, rows));
  }
  page_out(given);
}

}  // namespace

std::int64_t PlannedTensor::bytes() const { return elements_of(shape) * static_cast<std::int64_t>(size_of(dtype)); }

std::string PlannedFile::header() const {
  nlohmann::ordered_json json;
  json["__metadata__"] = {{"format", "pt"}};
  std::int64_t at = 0;
  for (const PlannedTensor& tensor : tensors) {
    json[tensor.name] = {
        {"dtype", name_of(tensor.dtype)}, {"shape", tensor.shape}, {"data_offsets", {at, at + tensor.bytes()}}};
    at += tensor.bytes();
  }
  std::string text = json.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = text.size();
  std::string out(sizeof length, '\0');
  std::memcpy(out.data(), &length, sizeof length);
  return out + text;
}

std::int64_t PlannedFile::bytes() const {
  auto sum = static_cast<std::int64_t>(header().size());
  for (const PlannedTensor& tensor : tensors) sum += tensor.bytes();
  return sum;
}

std::vector<PlannedFile> plan_files(const std::string& stem, const ConvertSource& source,
                                    const std::vector<WantedTensor>& layout, ConvertType type,
                                    std::int64_t shard_bytes) {
  std::vector<PlannedFile> files(1);
  std::int64_t held = 0;
  for (const WantedTensor& wanted : layout) {
    const std::vector<PlannedTensor> planned = plan_tensor(source, wanted, type);
    std::int64_t bytes = 0;
    for (const PlannedTensor& tensor : planned) bytes += tensor.bytes();
    if (held > 0 && held + bytes > shard_bytes) {
      files.emplace_back();
      held = 0;
    }
    held += bytes;
    files.back().tensors.insert(files.back().tensors.end(), planned.begin(), planned.end());
  }
  for (std::size_t i = 0; i < files.size(); ++i) {
    PlannedFile& file = files[i];
    file.source = &source;
    file.name = files.size() == 1 ? stem + ".safetensors"
                                  : fmt::format("{}-{:05}-of-{:05}.safetensors", stem, i + 1, files.size());
    std::stable_sort(file.tensors.begin(), file.tensors.end(), [](const PlannedTensor& a, const PlannedTensor& b) {
      return size_of(a.dtype) > size_of(b.dtype);
    });
  }
  return files;
}

std::uint32_t write_tensors(const PlannedFile& file, const std::string& path, const PieceCounter& count) {
  FileWriter out(path, count);
  const std::string header = file.header();
  out.write(header.data(), header.size());
  for (const PlannedTensor& tensor : file.tensors) write_tensor(file, tensor, out);
  return out.commit();
}

std::uint32_t read_back(const std::string& path, const PieceCounter& count) {
  const auto fail = [&] {
    throw Error(ErrorKind::system,
                fmt::format("cannot read {} back: {}", path, std::generic_category().message(errno)));
  };
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) fail();
  const struct Closer {
    int file;
    ~Closer() { ::close(file); }
  } closer{file};
  (void)::posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);  // from the disk, not from what was just written
  std::vector<std::uint8_t> piece(static_cast<std::size_t>(kPiece));
  auto crc = static_cast<std::uint32_t>(::crc32_z(0, nullptr, 0));
  for (;;) {
    const ssize_t got = ::read(file, piece.data(), piece.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail();
    if (got == 0) return crc;
    crc = static_cast<std::uint32_t>(::crc32_z(crc, piece.data(), static_cast<std::size_t>(got)));
    count(got);
  }
}

}  // namespace sparvar
