// Opcodes: CPython's Lib/pickletools.py describes them.
#include "weights/pickle.h"

#include <fmt/format.h>

#include <bit>

#include "sparvar/error.h"
#include "weights/pickle_reader.h"

namespace sparvar {
namespace {

using Kind = PickleValue::Kind;

constexpr std::size_t kMaxBytes = 64'000'000, kMaxMarks = 1'000;
constexpr int kFirstProtocol = 2, kLastProtocol = 5;

namespace op {
constexpr std::uint8_t kMark = '(', kStop = '.', kPop = '0', kPopMark = '1', kNone = 'N', kTrue = 0x88, kFalse = 0x89;
constexpr std::uint8_t kInt4 = 'J', kInt1 = 'K', kInt2 = 'M', kLong1 = 0x8a, kLong4 = 0x8b, kFloat = 'G';
constexpr std::uint8_t kText4 = 'X', kText1 = 0x8c, kText8 = 0x8d, kString4 = 'T', kString1 = 'U';
constexpr std::uint8_t kBytes4 = 'B', kBytes1 = 'C', kBytes8 = 0x8e;
constexpr std::uint8_t kEmptyTuple = ')', kTuple = 't', kTuple1 = 0x85, kTuple2 = 0x86, kTuple3 = 0x87;
constexpr std::uint8_t kEmptyList = ']', kList = 'l', kAppend = 'a', kAppends = 'e';
constexpr std::uint8_t kEmptyDict = '}', kDict = 'd', kSetItem = 's', kSetItems = 'u';
constexpr std::uint8_t kEmptySet = 0x8f, kAddItems = 0x90;
constexpr std::uint8_t kGlobal = 'c', kStackGlobal = 0x93, kReduce = 'R', kBuild = 'b', kPersistent = 'Q';
constexpr std::uint8_t kPut1 = 'q', kPut4 = 'r', kMemoize = 0x94, kGet1 = 'h', kGet4 = 'j';
constexpr std::uint8_t kProtocol = 0x80, kFrame = 0x95;
}  // namespace op

/// Opcodes that exist and are refused.
const char* refused_name(std::uint8_t code) {
  switch (code) {
    case 'i':
      return "INST";
    case 'o':
      return "OBJ";
    case 0x81:
      return "NEWOBJ";
    case 0x92:
      return "NEWOBJ_EX";
    case 0x82:
      return "EXT1";
    case 0x83:
      return "EXT2";
    case 0x84:
      return "EXT4";
    case 'P':
      return "PERSID";
    case 'I':
      return "INT";
    case 'L':
      return "LONG";
    case 'F':
      return "FLOAT";
    case 'S':
      return "STRING";
    case 'V':
      return "UNICODE";
    case 'p':
      return "PUT";
    case 'g':
      return "GET";
    case '2':
      return "DUP";
    case 0x91:
      return "FROZENSET";
    case 0x96:
      return "BYTEARRAY8";
    case 0x97:
      return "NEXT_BUFFER";
    case 0x98:
      return "READONLY_BUFFER";
    default:
      return nullptr;
  }
}

}  // namespace

Pickle PickleReader::read() {
  if (bytes_.size() > kMaxBytes) fail(fmt::format("{} bytes long, expected at most {}", bytes_.size(), kMaxBytes));
  if (bytes_.empty() || byte_at(0) != op::kProtocol)
    fail(fmt::format("expected a pickle of protocol {} to {}", kFirstProtocol, kLastProtocol));
  while (step()) {
  }
  if (at_ != bytes_.size()) fail(fmt::format("{} bytes follow the end of the pickle", bytes_.size() - at_));
  pickle_.root = pop();
  if (!stack_.empty() || !marks_.empty()) fail("values are left when the pickle ends");
  return std::move(pickle_);
}

bool PickleReader::step() {
  opcode_ = at_;
  if (at_ >= bytes_.size()) fail("the pickle has no end (was the file cut short?)");
  const auto code = number<std::uint8_t>();
  if (code == op::kStop) return false;
  if (!scalar(code) && !container(code) && !special(code)) refuse(code);
  return true;
}

void PickleReader::refuse(std::uint8_t code) {
  if (const char* name = refused_name(code))
    fail(fmt::format("opcode {} (0x{:02x}) is not allowed; nothing was run", name, code));
  fail(fmt::format("0x{:02x} is not an opcode", code));
}

bool PickleReader::scalar(std::uint8_t code) {
  switch (code) {
    case op::kNone:
      push_new(Kind::none);
      return true;
    case op::kTrue:
      push_new(Kind::boolean).number = 1;
      return true;
    case op::kFalse:
      push_new(Kind::boolean);
      return true;
    case op::kInt4:
      push_integer(number<std::int32_t>());
      return true;
    case op::kInt1:
      push_integer(number<std::uint8_t>());
      return true;
    case op::kInt2:
      push_integer(number<std::uint16_t>());
      return true;
    case op::kLong1:
      push_long(number<std::uint8_t>());
      return true;
    case op::kLong4:
      push_long(number<std::uint32_t>());
      return true;
    case op::kFloat:
      push_real(number<std::uint64_t>());
      return true;
    case op::kText1:
      push_text(number<std::uint8_t>());
      return true;
    case op::kText4:
      push_text(number<std::uint32_t>());
      return true;
    case op::kText8:
      push_text(number<std::uint64_t>());
      return true;
    case op::kString1:
      push_text(number<std::uint8_t>());
      return true;
    case op::kString4:
      push_text(number<std::uint32_t>());
      return true;
    case op::kBytes1:
      push_bytes(number<std::uint8_t>());
      return true;
    case op::kBytes4:
      push_bytes(number<std::uint32_t>());
      return true;
    case op::kBytes8:
      push_bytes(number<std::uint64_t>());
      return true;
    default:
      return false;
  }
}

void PickleReader::push_bytes(std::uint64_t length) {
  const std::string_view found = text(length);
  push_new(Kind::bytes).text = found;
}

void PickleReader::push_real(std::uint64_t big_endian) {
  push_new(Kind::real).real = std::bit_cast<double>(__builtin_bswap64(big_endian));
}

bool PickleReader::container(std::uint8_t code) {
  switch (code) {
    case op::kEmptyTuple:
      push_new(Kind::tuple);
      return true;
    case op::kTuple1:
      push_tuple(1);
      return true;
    case op::kTuple2:
      push_tuple(2);
      return true;
    case op::kTuple3:
      push_tuple(3);
      return true;
    case op::kTuple:
      push_of(Kind::tuple, pop_marked());
      return true;
    case op::kEmptyList:
      push_new(Kind::list);
      return true;
    case op::kList:
      push_of(Kind::list, pop_marked());
      return true;
    case op::kAppend: {
      const std::uint32_t item = pop();
      extend(Kind::list, "APPEND", {item});
      return true;
    }
    case op::kAppends: {
      const std::vector<std::uint32_t> items = pop_marked();
      extend(Kind::list, "APPENDS", items);
      return true;
    }
    case op::kEmptyDict:
      push_new(Kind::dict);
      return true;
    case op::kDict:
      push_of(Kind::dict, pop_marked());
      return true;
    case op::kSetItem: {
      const std::uint32_t item = pop();
      const std::uint32_t key = pop();
      extend(Kind::dict, "SETITEM", {key, item});
      return true;
    }
    case op::kSetItems: {
      const std::vector<std::uint32_t> items = pop_marked();
      extend(Kind::dict, "SETITEMS", items);
      return true;
    }
    case op::kEmptySet:
      push_new(Kind::set);
      return true;
    case op::kAddItems: {
      const std::vector<std::uint32_t> items = pop_marked();
      extend(Kind::set, "ADDITEMS", items);
      return true;
    }
    default:
      return false;
  }
}

bool PickleReader::special(std::uint8_t code) {
  switch (code) {
    case op::kProtocol:
      protocol(number<std::uint8_t>());
      return true;
    case op::kFrame:
      frame(number<std::uint64_t>());
      return true;
    case op::kMark:
      mark();
      return true;
    case op::kPop:
      pop();
      return true;
    case op::kPopMark:
      pop_marked();
      return true;
    case op::kPut1:
      put(number<std::uint8_t>());
      return true;
    case op::kPut4:
      put(number<std::uint32_t>());
      return true;
    case op::kMemoize:
      put(memo_.size());
      return true;
    case op::kGet1:
      get(number<std::uint8_t>());
      return true;
    case op::kGet4:
      get(number<std::uint32_t>());
      return true;
    case op::kGlobal: {
      const std::string_view module = line();
      push_global("GLOBAL", module, line());
      return true;
    }
    case op::kStackGlobal:
      stack_global();
      return true;
    case op::kReduce:
      reduce();
      return true;
    case op::kBuild:
      build();
      return true;
    case op::kPersistent:
      persistent();
      return true;
    default:
      return false;
  }
}

void PickleReader::protocol(int version) const {
  if (opcode_ != 0) fail("PROTO in the middle of a pickle");
  if (version < kFirstProtocol || version > kLastProtocol)
    fail(fmt::format("protocol {}, expected {} to {}", version, kFirstProtocol, kLastProtocol));
}

void PickleReader::frame(std::uint64_t length) const {
  if (length > bytes_.size() - at_)
    fail(fmt::format("a frame of {} bytes, but {} follow", length, bytes_.size() - at_));
}

void PickleReader::mark() {
  if (marks_.size() >= kMaxMarks) fail(fmt::format("nested more than {} deep", kMaxMarks));
  marks_.push_back(stack_.size());
}

Pickle read_pickle(std::span<const std::byte> bytes, const std::string& where) {
  return PickleReader(bytes, where).read();
}

}  // namespace sparvar
