// The machine that a pickle runs on, of the opcodes that only make data. Values live in one list and refer to each
// other by index, so that a value that holds itself, or one that is held a million times, costs nothing to keep or to
// free.
#pragma once

#include <cstring>
#include <unordered_map>
#include <utility>

#include "weights/pickle.h"

namespace sparvar {

class PickleReader {
  using Kind = PickleValue::Kind;

 public:
  PickleReader(std::span<const std::byte> bytes, std::string where) : bytes_(bytes), where_(std::move(where)) {}
  /// Once.
  Pickle read();

 private:
  // ---- bytes, values and the stack (pickle_values.cpp)
  std::uint8_t byte_at(std::size_t at) const { return std::to_integer<std::uint8_t>(bytes_[at]); }
  [[noreturn]] void fail(const std::string& what) const;
  template <typename T>
  T number() {
    if (bytes_.size() - at_ < sizeof(T)) fail("the pickle ends in the middle of an opcode (was the file cut short?)");
    T value;
    std::memcpy(&value, bytes_.data() + at_, sizeof value);
    at_ += sizeof value;
    return value;
  }
  std::string_view text(std::uint64_t length);
  std::string_view line();
  PickleValue& value(std::uint32_t index) { return pickle_.values[index]; }
  void push(std::uint32_t index);
  PickleValue& push_new(Kind kind);
  std::size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  std::uint32_t pop();
  std::uint32_t top() const;
  /// The values since the last mark, which goes too.
  std::vector<std::uint32_t> pop_marked();
  void add(std::uint32_t index, const std::vector<std::uint32_t>& items);
  void push_of(Kind kind, const std::vector<std::uint32_t>& items);
  void push_tuple(std::size_t count);
  void extend(Kind kind, const char* opcode, const std::vector<std::uint32_t>& items);
  void push_text(std::uint64_t length);
  /// A little-endian integer of any length, of which 64 bits must be enough.
  void push_long(std::uint64_t length);
  void put(std::uint64_t key);
  void get(std::uint64_t key);

  // ---- globals, and what may be done with them (pickle_globals.cpp)
  void push_global(const char* opcode, std::string_view module, std::string_view name);
  std::vector<std::uint32_t> arguments(std::uint32_t index, const char* of, std::size_t least, std::size_t most);
  std::int64_t integer(std::uint32_t index, const char* what);
  Shape extents(std::uint32_t index, const char* what);
  void persistent();
  void rebuild_tensor(std::uint32_t index);
  void reduce();
  /// A module's state dict carries `_metadata` (versions of its parts), which is not needed.
  void build();
  void stack_global();

  // ---- opcodes (pickle.cpp)
  bool step();
  [[noreturn]] void refuse(std::uint8_t code);
  bool scalar(std::uint8_t code);
  void push_integer(std::int64_t found) { push_new(Kind::integer).number = found; }
  void push_bytes(std::uint64_t length);
  void push_real(std::uint64_t big_endian);
  bool container(std::uint8_t code);
  bool special(std::uint8_t code);
  void protocol(int version) const;
  void frame(std::uint64_t length) const;
  void mark();

  std::span<const std::byte> bytes_;
  std::string where_;
  std::size_t at_ = 0;
  std::size_t opcode_ = 0;  // where the current one is
  std::size_t items_ = 0;
  std::vector<std::uint32_t> stack_;
  std::vector<std::size_t> marks_;
  std::unordered_map<std::uint64_t, std::uint32_t> memo_;
  Pickle pickle_;
};

}  // namespace sparvar
