// Bytes, values, the stack, marks and the memo, each with its bound.
#include <fmt/format.h>

#include <limits>

#include "core/utf8.h"
#include "sparvar/error.h"
#include "weights/pickle_reader.h"

namespace sparvar {
namespace {

using Kind = PickleValue::Kind;

constexpr std::size_t kMaxValues = 2'000'000, kMaxStack = 1'000'000, kMaxMemo = 2'000'000;
constexpr std::size_t kMaxItems = 16'000'000;  // of all values

}  // namespace

void PickleReader::fail(const std::string& what) const {
  throw Error(ErrorKind::input, fmt::format("{}: byte {}: {}", where_, opcode_, what));
}

std::string_view PickleReader::text(std::uint64_t length) {
  if (length > bytes_.size() - at_)
    fail(fmt::format("an opcode announces {} bytes, but {} follow", length, bytes_.size() - at_));
  const std::string_view found(reinterpret_cast<const char*>(bytes_.data()) + at_, length);
  at_ += length;
  return found;
}

std::string_view PickleReader::line() {
  const std::string_view rest(reinterpret_cast<const char*>(bytes_.data()) + at_, bytes_.size() - at_);
  const std::size_t end = rest.find('\n');
  if (end == std::string_view::npos) fail("the name of a global has no end");
  at_ += end + 1;
  return rest.substr(0, end);
}

void PickleReader::push(std::uint32_t index) {
  if (stack_.size() >= kMaxStack) fail(fmt::format("more than {} values on the stack", kMaxStack));
  stack_.push_back(index);
}

PickleValue& PickleReader::push_new(Kind kind) {
  if (pickle_.values.size() >= kMaxValues) fail(fmt::format("more than {} values", kMaxValues));
  push(static_cast<std::uint32_t>(pickle_.values.size()));
  PickleValue& made = pickle_.values.emplace_back();
  made.kind = kind;
  return made;
}

std::uint32_t PickleReader::pop() {
  if (stack_.size() <= floor()) fail("an opcode takes a value from an empty stack");
  const std::uint32_t index = stack_.back();
  stack_.pop_back();
  return index;
}

std::uint32_t PickleReader::top() const {
  if (stack_.size() <= floor()) fail("an opcode needs a value, but the stack is empty");
  return stack_.back();
}

std::vector<std::uint32_t> PickleReader::pop_marked() {
  if (marks_.empty()) fail("an opcode needs a mark, but there is none");
  std::vector<std::uint32_t> items(stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back()), stack_.end());
  stack_.resize(marks_.back());
  marks_.pop_back();
  return items;
}

void PickleReader::add(std::uint32_t index, const std::vector<std::uint32_t>& items) {
  items_ += items.size();
  if (items_ > kMaxItems) fail(fmt::format("more than {} items in lists, tuples and dicts", kMaxItems));
  std::vector<std::uint32_t>& held = value(index).items;
  held.insert(held.end(), items.begin(), items.end());
}

void PickleReader::push_of(Kind kind, const std::vector<std::uint32_t>& items) {
  if (kind == Kind::dict && items.size() % 2 != 0) fail("a dict gets a key without a value");
  push_new(kind);
  add(stack_.back(), items);
}

void PickleReader::push_tuple(std::size_t count) {
  std::vector<std::uint32_t> items(count);
  for (std::size_t i = count; i-- > 0;) items[i] = pop();
  push_of(Kind::tuple, items);
}

void PickleReader::extend(Kind kind, const char* opcode, const std::vector<std::uint32_t>& items) {
  const std::uint32_t target = top();
  if (value(target).kind != kind)
    fail(fmt::format("{} on a {}, expected a {}", opcode, name_of(value(target).kind), name_of(kind)));
  if (kind == Kind::dict && items.size() % 2 != 0) fail("a dict gets a key without a value");
  add(target, items);
}

void PickleReader::push_text(std::uint64_t length) {
  const std::string_view found = text(length);
  if (first_invalid_byte(found) != std::string_view::npos) fail("a text is not UTF-8");
  push_new(Kind::text).text = found;
}

void PickleReader::push_long(std::uint64_t length) {
  if (length > std::numeric_limits<std::int32_t>::max()) fail("LONG4 of a negative length");
  const std::string_view digits = text(length);
  std::uint64_t bits = digits.empty() || static_cast<signed char>(digits.back()) >= 0 ? 0 : ~std::uint64_t{0};
  if (digits.size() > 8) fail(fmt::format("an integer of {} bytes, expected at most 8", digits.size()));
  std::memcpy(&bits, digits.data(), digits.size());
  push_new(Kind::integer).number = static_cast<std::int64_t>(bits);
}

void PickleReader::put(std::uint64_t key) {
  if (memo_.size() >= kMaxMemo) fail(fmt::format("more than {} memos", kMaxMemo));
  memo_[key] = top();
}

void PickleReader::get(std::uint64_t key) {
  const auto found = memo_.find(key);
  if (found == memo_.end()) fail(fmt::format("memo {} was never written", key));
  push(found->second);
}

const char* name_of(PickleValue::Kind kind) {
  switch (kind) {
    case Kind::none:
      return "None";
    case Kind::boolean:
      return "bool";
    case Kind::integer:
      return "int";
    case Kind::real:
      return "float";
    case Kind::text:
      return "text";
    case Kind::bytes:
      return "bytes";
    case Kind::tuple:
      return "tuple";
    case Kind::list:
      return "list";
    case Kind::dict:
      return "dict";
    case Kind::set:
      return "set";
    case Kind::global:
      return "global";
    case Kind::storage:
      return "storage";
    case Kind::tensor:
      return "tensor";
  }
  return "value";
}

}  // namespace sparvar
