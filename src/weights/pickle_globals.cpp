// The globals that a checkpoint may name, and what is made of them: tensors, as data.
#include <fmt/format.h>

#include "sparvar/error.h"
#include "weights/pickle_reader.h"
#include "weights/strict_json.h"

namespace sparvar {
namespace {

using Kind = PickleValue::Kind;

constexpr std::size_t kMaxRank = 16;

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

}  // namespace

void PickleReader::push_global(const char* opcode, std::string_view module, std::string_view name) {
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

std::vector<std::uint32_t> PickleReader::arguments(std::uint32_t index, const char* of, std::size_t least,
                                                   std::size_t most) {
  const PickleValue& found = value(index);
  if (found.kind != Kind::tuple || found.items.size() < least || found.items.size() > most)
    fail(fmt::format("{} gets a {} of {} values, expected a tuple of {}", of, name_of(found.kind), found.items.size(),
                     least == most ? fmt::format("{}", least) : fmt::format("{} to {}", least, most)));
  return found.items;
}

std::int64_t PickleReader::integer(std::uint32_t index, const char* what) {
  const PickleValue& found = value(index);
  if (found.kind != Kind::integer) fail(fmt::format("{} is a {}, expected an integer", what, name_of(found.kind)));
  if (found.number < 0) fail(fmt::format("{} is {}, expected one from 0", what, found.number));
  return found.number;
}

Shape PickleReader::extents(std::uint32_t index, const char* what) {
  const PickleValue& found = value(index);
  if (found.kind != Kind::tuple || found.items.size() > kMaxRank)
    fail(fmt::format("the {} of a tensor is a {} of {} values, expected a tuple of at most {}", what,
                     name_of(found.kind), found.items.size(), kMaxRank));
  Shape out;
  for (const std::uint32_t item : found.items) out.push_back(integer(item, what));
  return out;
}

void PickleReader::persistent() {
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

void PickleReader::rebuild_tensor(std::uint32_t index) {
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

void PickleReader::reduce() {
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

void PickleReader::build() {
  const PickleValue& state = value(pop());
  const PickleValue& target = value(top());
  if (target.kind != Kind::dict || !target.ordered || state.kind != Kind::dict)
    fail(
        fmt::format("BUILD on a {}, which is not allowed: only the attributes of an OrderedDict are skipped; nothing "
                    "was run",
                    name_of(target.kind)));
}

void PickleReader::stack_global() {
  const std::uint32_t name = pop();
  const std::uint32_t module = pop();
  if (value(name).kind != Kind::text || value(module).kind != Kind::text) fail("STACK_GLOBAL without two texts");
  push_global("STACK_GLOBAL", value(module).text, value(name).text);
}

}  // namespace sparvar
