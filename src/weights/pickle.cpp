// Opcodes: CPython's Lib/pickletools.py describes them. Values live in one list and refer to each other by index, so
// that a value that holds itself, or one that is held a million times, costs nothing to keep or to free.
#include "weights/pickle.h"

#include <fmt/format.h>

#include <bit>
#include <cstring>
#include <limits>
#include <unordered_map>

#include "core/utf8.h"
#include "sparvar/error.h"
#include "weights/strict_json.h"

namespace sparvar {
namespace {

using Kind = PickleValue::Kind;

constexpr std::size_t kMaxBytes = 64'000'000;
constexpr std::size_t kMaxValues = 2'000'000, kMaxStack = 1'000'000, kMaxMemo = 2'000'000, kMaxMarks = 1'000;
constexpr std::size_t kMaxItems = 16'000'000;  // of all values
constexpr std::size_t kMaxRank = 16;
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

struct KnownStorage {
  std::string_view name;
  std::optional<DType> dtype;
};
constexpr KnownStorage kStorages[] = {
    {"torch.FloatStorage", DType::f32},
    {"torch.BFloat16Storage", DType::bf16},
    {"torch.HalfStorage", DType::f16},
    {"torch.DoubleStorage", DType::f64},
    {"torch.LongStorage", DType::i64},
    {"torch.IntStorage", DType::i32},
    {"torch.ShortStorage", DType::i16},
    {"torch.CharStorage", DType::i8},
    {"torch.ByteStorage", DType::u8},
    {"torch.BoolStorage", DType::boolean},
    {"torch.storage.UntypedStorage", DType::u8},
    {"torch.storage.TypedStorage", std::nullopt},
};

class Reader {
 public:
  Reader(std::span<const std::byte> bytes, std::string where) : bytes_(bytes), where_(std::move(where)) {}

  Pickle read() {
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

 private:
  // ---- bytes

  std::uint8_t byte_at(std::size_t at) const { return std::to_integer<std::uint8_t>(bytes_[at]); }

  [[noreturn]] void fail(const std::string& what) const {
    throw Error(ErrorKind::input, fmt::format("{}: byte {}: {}", where_, opcode_, what));
  }

  template <typename T>
  T number() {
    if (bytes_.size() - at_ < sizeof(T)) fail("the pickle ends in the middle of an opcode (was the file cut short?)");
    T value;
    std::memcpy(&value, bytes_.data() + at_, sizeof value);
    at_ += sizeof value;
    return value;
  }

  std::string_view text(std::uint64_t length) {
    if (length > bytes_.size() - at_)
      fail(fmt::format("an opcode announces {} bytes, but {} follow", length, bytes_.size() - at_));
    const std::string_view found(reinterpret_cast<const char*>(bytes_.data()) + at_, length);
    at_ += length;
    return found;
  }

  std::string_view line() {
    const std::string_view rest(reinterpret_cast<const char*>(bytes_.data()) + at_, bytes_.size() - at_);
    const std::size_t end = rest.find('\n');
    if (end == std::string_view::npos) fail("the name of a global has no end");
    at_ += end + 1;
    return rest.substr(0, end);
  }

  // ---- values

  PickleValue& value(std::uint32_t index) { return pickle_.values[index]; }

  void push(std::uint32_t index) {
    if (stack_.size() >= kMaxStack) fail(fmt::format("more than {} values on the stack", kMaxStack));
    stack_.push_back(index);
  }

  PickleValue& push_new(Kind kind) {
    if (pickle_.values.size() >= kMaxValues) fail(fmt::format("more than {} values", kMaxValues));
    push(static_cast<std::uint32_t>(pickle_.values.size()));
    PickleValue& made = pickle_.values.emplace_back();
    made.kind = kind;
    return made;
  }

  std::size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }

  std::uint32_t pop() {
    if (stack_.size() <= floor()) fail("an opcode takes a value from an empty stack");
    const std::uint32_t index = stack_.back();
    stack_.pop_back();
    return index;
  }

  std::uint32_t top() const {
    if (stack_.size() <= floor()) fail("an opcode needs a value, but the stack is empty");
    return stack_.back();
  }

  /// The values since the last mark, which goes too.
  std::vector<std::uint32_t> pop_marked() {
    if (marks_.empty()) fail("an opcode needs a mark, but there is none");
    std::vector<std::uint32_t> items(stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back()), stack_.end());
    stack_.resize(marks_.back());
    marks_.pop_back();
    return items;
  }

  void add(std::uint32_t index, const std::vector<std::uint32_t>& items) {
    items_ += items.size();
    if (items_ > kMaxItems) fail(fmt::format("more than {} items in lists, tuples and dicts", kMaxItems));
    std::vector<std::uint32_t>& held = value(index).items;
    held.insert(held.end(), items.begin(), items.end());
  }

  void push_of(Kind kind, const std::vector<std::uint32_t>& items) {
    if (kind == Kind::dict && items.size() % 2 != 0) fail("a dict gets a key without a value");
    push_new(kind);
    add(stack_.back(), items);
  }

  void push_tuple(std::size_t count) {
    std::vector<std::uint32_t> items(count);
    for (std::size_t i = count; i-- > 0;) items[i] = pop();
    push_of(Kind::tuple, items);
  }

  void extend(Kind kind, const char* opcode, const std::vector<std::uint32_t>& items) {
    const std::uint32_t target = top();
    if (value(target).kind != kind)
      fail(fmt::format("{} on a {}, expected a {}", opcode, name_of(value(target).kind), name_of(kind)));
    if (kind == Kind::dict && items.size() % 2 != 0) fail("a dict gets a key without a value");
    add(target, items);
  }

  void push_text(std::uint64_t length) {
    const std::string_view found = text(length);
    if (first_invalid_byte(found) != std::string_view::npos) fail("a text is not UTF-8");
    push_new(Kind::text).text = found;
  }

  /// A little-endian integer of any length, of which 64 bits must be enough.
  void push_long(std::uint64_t length) {
    if (length > std::numeric_limits<std::int32_t>::max()) fail("LONG4 of a negative length");
    const std::string_view digits = text(length);
    std::uint64_t bits = digits.empty() || static_cast<signed char>(digits.back()) >= 0 ? 0 : ~std::uint64_t{0};
    if (digits.size() > 8) fail(fmt::format("an integer of {} bytes, expected at most 8", digits.size()));
    std::memcpy(&bits, digits.data(), digits.size());
    push_new(Kind::integer).number = static_cast<std::int64_t>(bits);
  }

  void put(std::uint64_t key) {
    if (memo_.size() >= kMaxMemo) fail(fmt::format("more than {} memos", kMaxMemo));
    memo_[key] = top();
  }

  void get(std::uint64_t key) {
    const auto found = memo_.find(key);
    if (found == memo_.end()) fail(fmt::format("memo {} was never written", key));
    push(found->second);
  }

  // ---- globals, and what may be done with them

  void push_global(const char* opcode, std::string_view module, std::string_view name) {
    const std::string full = fmt::format("{}.{}", module, name);
    PickleValue made;
    made.kind = Kind::global;
    if (full == "collections.OrderedDict") {
      made.global = PickleGlobal::ordered_dict;
    } else if (full == "torch._utils._rebuild_tensor_v2") {
      made.global = PickleGlobal::rebuild_tensor;
    } else if (full == "torch._utils._rebuild_parameter") {
      made.global = PickleGlobal::rebuild_parameter;
    } else {
      made.global = PickleGlobal::storage;
      bool known = false;
      for (const KnownStorage& storage : kStorages) {
        if (storage.name != full) continue;
        known = true;
        made.dtype = storage.dtype;
      }
      if (!known)
        fail(
            fmt::format("{} names the global {}, which is not allowed: a checkpoint holds tensors, lists, dicts, "
                        "numbers and texts; nothing was run",
                        opcode, quoted_name(full)));
    }
    push_new(Kind::global) = made;
  }

  std::vector<std::uint32_t> arguments(std::uint32_t index, const char* of, std::size_t least, std::size_t most) {
    const PickleValue& found = value(index);
    if (found.kind != Kind::tuple || found.items.size() < least || found.items.size() > most)
      fail(fmt::format("{} gets a {} of {} values, expected a tuple of {}", of, name_of(found.kind), found.items.size(),
                       least == most ? fmt::format("{}", least) : fmt::format("{} to {}", least, most)));
    return found.items;
  }

  std::int64_t integer(std::uint32_t index, const char* what) {
    const PickleValue& found = value(index);
    if (found.kind != Kind::integer) fail(fmt::format("{} is a {}, expected an integer", what, name_of(found.kind)));
    if (found.number < 0) fail(fmt::format("{} is {}, expected one from 0", what, found.number));
    return found.number;
  }

  Shape extents(std::uint32_t index, const char* what) {
    const PickleValue& found = value(index);
    if (found.kind != Kind::tuple || found.items.size() > kMaxRank)
      fail(fmt::format("the {} of a tensor is a {} of {} values, expected a tuple of at most {}", what,
                       name_of(found.kind), found.items.size(), kMaxRank));
    Shape out;
    for (const std::uint32_t item : found.items) out.push_back(integer(item, what));
    return out;
  }

  void persistent() {
    const std::vector<std::uint32_t> items = arguments(pop(), "BINPERSID", 5, 5);
    const auto is_text = [&](std::size_t i) { return value(items[i]).kind == Kind::text; };
    const PickleValue& type = value(items[1]);
    if (!is_text(0) || value(items[0]).text != "storage" || type.kind != Kind::global ||
        type.global != PickleGlobal::storage || !is_text(2) || !is_text(3))
      fail("BINPERSID: expected ('storage', type, key, device, elements)");
    const std::int64_t elements = integer(items[4], "the length of a storage");
    const std::optional<DType> dtype = type.dtype;
    const std::string_view key = value(items[2]).text;
    PickleValue& made = push_new(Kind::storage);
    made.text = key;
    made.dtype = dtype;
    made.number = elements;
  }

  void rebuild_tensor(std::uint32_t index) {
    const std::vector<std::uint32_t> items = arguments(index, "_rebuild_tensor_v2", 6, 7);
    const PickleValue& storage = value(items[0]);
    if (storage.kind != Kind::storage)
      fail(fmt::format("_rebuild_tensor_v2 gets a {}, expected a storage", name_of(storage.kind)));
    if (items.size() == 7 && value(items[6]).kind != Kind::none && !value(items[6]).items.empty())
      fail("_rebuild_tensor_v2 gets metadata (a conjugated or negated view), expected none");
    PickledTensor tensor;
    tensor.storage = storage.text;
    tensor.dtype = storage.dtype;
    tensor.storage_elements = storage.number;
    tensor.offset = integer(items[1], "the offset of a tensor");
    tensor.shape = extents(items[2], "shape");
    tensor.stride = extents(items[3], "stride");
    if (tensor.shape.size() != tensor.stride.size())
      fail(fmt::format("a tensor of shape {} has strides {}", to_string(tensor.shape), to_string(tensor.stride)));
    push_new(Kind::tensor).number = static_cast<std::int64_t>(pickle_.tensors.size());
    pickle_.tensors.push_back(std::move(tensor));
  }

  void reduce() {
    const std::uint32_t given = pop();
    const std::uint32_t callee = pop();
    if (value(callee).kind != Kind::global)
      fail(fmt::format("REDUCE calls a {}, which is not allowed; nothing was run", name_of(value(callee).kind)));
    switch (value(callee).global) {
      case PickleGlobal::ordered_dict:
        arguments(given, "OrderedDict", 0, 0);
        push_new(Kind::dict).ordered = true;
        return;
      case PickleGlobal::rebuild_tensor:
        return rebuild_tensor(given);
      case PickleGlobal::rebuild_parameter: {
        const std::uint32_t tensor = arguments(given, "_rebuild_parameter", 3, 3)[0];
        if (value(tensor).kind != Kind::tensor)
          fail(fmt::format("_rebuild_parameter gets a {}, expected a tensor", name_of(value(tensor).kind)));
        return push(tensor);
      }
      case PickleGlobal::storage:
        fail("REDUCE calls a type of storage, which is not allowed; nothing was run");
    }
  }

  /// A module's state dict carries `_metadata` (versions of its parts), which is not needed.
  void build() {
    const PickleValue& state = value(pop());
    const PickleValue& target = value(top());
    if (target.kind != Kind::dict || !target.ordered || state.kind != Kind::dict)
      fail(
          fmt::format("BUILD on a {}, which is not allowed: only the attributes of an OrderedDict are skipped; nothing "
                      "was run",
                      name_of(target.kind)));
  }

  void stack_global() {
    const std::uint32_t name = pop();
    const std::uint32_t module = pop();
    if (value(name).kind != Kind::text || value(module).kind != Kind::text) fail("STACK_GLOBAL without two texts");
    push_global("STACK_GLOBAL", value(module).text, value(name).text);
  }

  // ---- opcodes

  bool step() {
    opcode_ = at_;
    if (at_ >= bytes_.size()) fail("the pickle has no end (was the file cut short?)");
    const auto code = number<std::uint8_t>();
    if (code == op::kStop) return false;
    if (!scalar(code) && !container(code) && !special(code)) refuse(code);
    return true;
  }

  [[noreturn]] void refuse(std::uint8_t code) {
    if (const char* name = refused_name(code))
      fail(fmt::format("opcode {} (0x{:02x}) is not allowed; nothing was run", name, code));
    fail(fmt::format("0x{:02x} is not an opcode", code));
  }

  bool scalar(std::uint8_t code) {
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

  void push_integer(std::int64_t found) { push_new(Kind::integer).number = found; }
  void push_bytes(std::uint64_t length) {
    const std::string_view found = text(length);
    push_new(Kind::bytes).text = found;
  }
  void push_real(std::uint64_t big_endian) {
    push_new(Kind::real).real = std::bit_cast<double>(__builtin_bswap64(big_endian));
  }

  bool container(std::uint8_t code) {
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

  bool special(std::uint8_t code) {
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

  void protocol(int version) const {
    if (opcode_ != 0) fail("PROTO in the middle of a pickle");
    if (version < kFirstProtocol || version > kLastProtocol)
      fail(fmt::format("protocol {}, expected {} to {}", version, kFirstProtocol, kLastProtocol));
  }

  void frame(std::uint64_t length) const {
    if (length > bytes_.size() - at_)
      fail(fmt::format("a frame of {} bytes, but {} follow", length, bytes_.size() - at_));
  }

  void mark() {
    if (marks_.size() >= kMaxMarks) fail(fmt::format("nested more than {} deep", kMaxMarks));
    marks_.push_back(stack_.size());
  }

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

}  // namespace

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

Pickle read_pickle(std::span<const std::byte> bytes, const std::string& where) { return Reader(bytes, where).read(); }

}  // namespace sparvar
