// Attention on the caller's tensors: by lists that are known beforehand (any strides, CPU), and by a whole plan.
#include "sparvar/attention.h"

#include <fmt/format.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <omp.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <variant>

#include "array.h"
#include "attention/cs4a.h"
#include "backend/backend.h"
#include "lists.h"
#include "models/attention_runner.h"

namespace sparvar::python {
namespace {

using In = nb::ndarray<nb::ro>;
using Out = nb::ndarray<>;

/// Working memory of the calling thread: calls from several threads at once do not meet.
std::span<std::byte> thread_workspace(std::size_t bytes) {
  thread_local std::vector<std::byte> memory;
  if (memory.size() < bytes) memory.resize(bytes);
  return memory;
}

/// Lists on the CPU, for one shape of batch, heads and channels. Any strides.
class ListKernel {
 public:
  ListKernel(std::shared_ptr<const Lists> lists, int batch, int heads, int head_dim, bool bf16, float scale,
             int threads)
      : lists_(std::move(lists)),
        batch_(batch),
        heads_(heads),
        head_dim_(head_dim),
        prepared_(lists_->tiles, lists_->lists, lists_->keys,
                  {.batch = batch,
                   .heads = heads,
                   .head_dim = head_dim,
                   .precision = bf16 ? Precision::bf16 : Precision::f32,
                   .scale = scale,
                   .threads = threads > 0 ? threads : omp_get_max_threads()}) {}

  void run(const In& q_, const In& k_, const In& v_, const Out& out_, bool words) const {
    const Array4 q = array4("q", q_, words), k = array4("k", k_, words), v = array4("v", v_, words),
                 out = array4("out", out_, words);
    require_fit(q, k, v, out, lists_->queries(), lists_->keys);
    if (q.on_gpu || q.shape[0] != batch_ || q.shape[1] != heads_ || q.shape[3] != head_dim_)
      throw Error(ErrorKind::usage, fmt::format("attention: q {} is not of the shape that was prepared", q.text()));
    const nb::gil_scoped_release released;
    prepared_.run({.q = q.data,
                   .k = k.data,
                   .v = v.data,
                   .out = out.data,
                   .q_strides = q.attention_strides(),
                   .k_strides = k.attention_strides(),
                   .v_strides = v.attention_strides(),
                   .out_strides = out.attention_strides()},
                  thread_workspace(prepared_.workspace_bytes()));
  }

 private:
  std::shared_ptr<const Lists> lists_;
  int batch_, heads_, head_dim_;
  PreparedAttention prepared_;
};

/// What a call is told besides its arrays.
struct Call {
  int layer = 0;
  int scale = 0;
  float logit_scale = 1;
  std::shared_ptr<Lists> lists;  // instead of the plan
};

/// A call whose arrays were checked: others of these shapes and strides differ in where they lie alone.
struct PreparedCall {
  Call call;
  AttentionArgs args;
  CarriedKeys carried;
  std::int64_t bytes = 0;  // of working memory; 0 on the CPU
};

/// The same of the kernel before attention: how q, k and v are made of the qkv product.
struct PreparedSplit {
  Tensor qkv, q, k, v;
  QkvArgs args;
};

/// Of PyTorch's addresses, which Python has as numbers.
void* pointer_to(std::uintptr_t address) {
  return reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
}

/// The same array at another address.
Tensor moved(const Tensor& like, std::uintptr_t to) {
  return like.defined() ? Tensor(pointer_to(to), like.dtype(), like.shape(), nullptr, like.place()) : Tensor();
}
/// Of one that kernels read 16 bytes at once.
Tensor moved(const char* name, const Tensor& like, std::uintptr_t to) {
  if (like.defined() && like.place() == Place::device) require_gpu_alignment(name, to);
  return moved(like, to);
}

/// A plan on one device. Arrays are packed, k and v may be the first rows of a larger cache. One call at a time: others
/// wait.
class PlanKernel {
 public:
  PlanKernel(const AttentionPlan& plan, const Grids& grids, const std::string& device, bool bf16)
      : plan_(plan), schedule_(schedule_of(grids)), dtype_(bf16 ? DType::bf16 : DType::f32) {
    plan_.validate();
    if (plan_.pruning)
      throw Error(ErrorKind::usage, fmt::format("plan {} prunes tokens: which ones run depends on the picture; it is "
                                                "for sparvar.Pipeline alone",
                                                plan_.name));
    if (device == "cpu") {
      backend_ = make_cpu_backend({.compute = dtype_, .threads = 0});
    } else {
      std::string why;
      const int index = std::stoi(device.substr(device.find(':') + 1));
      backend_ = make_cuda_backend({.compute = dtype_, .device = index}, why);
      if (!backend_) throw Error(ErrorKind::system, fmt::format("device {}: {}", device, why));
      gpu_ = index;
    }
    constexpr int kLayers = 4097;  // a plan's rules go up to layer 4096
    runner_ = std::make_unique<AttentionRunner>(*backend_, plan_, schedule_, kLayers);
    for (int k = 0, keys = 0; k < static_cast<int>(schedule_.size()); ++k)
      keys_.push_back(keys += schedule_[k].tokens());
  }

  /// Shapes of what a cs4a rule carries from its decision scale: choice (B * H, groups, keys), residual (B, n_S, H, D)
  /// or nothing.
  nb::tuple carried_shapes(int layer, int scale, int batch, int heads, int head_dim) const {
    const auto* cs4a = std::get_if<Cs4aAttention>(&plan_.method(layer, scale));
    if (cs4a == nullptr) throw Error(ErrorKind::usage, fmt::format("layer {}, scale {} is not cs4a", layer, scale));
    check_scale(cs4a->decision_scale);
    const Grid grid = schedule_[cs4a->decision_scale];
    nb::object residual = nb::none();
    if (cs4a->residual) residual = nb::make_tuple(batch, grid.tokens(), heads, head_dim);
    return nb::make_tuple(nb::make_tuple(batch * heads, group_tiles(grid, cs4a->group).count(),
                                         counts_to_choose(*cs4a, schedule_).front()),
                          residual);
  }

  /// Checks what later calls have in common.
  PreparedCall prepare(const Call& call, const In& q, const In& k, const In& v, const Out& out,
                       const std::optional<In>& choice, const std::optional<In>& residual) {
    AttentionArgs args = args_of(call, q, k, v, out, false);
    CarriedKeys carried = carried_of(choice, residual);
    const nb::gil_scoped_release released;
    const std::lock_guard lock(mutex_);
    const std::int64_t bytes = backend_->working_bytes([&] { attend(call, args, carried); });
    return {call, std::move(args), std::move(carried), bytes};
  }

  /// `run` on arrays at these addresses; 0: there is none. On a GPU on the stream, with `memory` to work in.
  void run_at(const PreparedCall& prepared, std::uintptr_t stream, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v,
              std::uintptr_t out, std::uintptr_t choice, std::uintptr_t residual, std::uintptr_t memory) {
    AttentionArgs args = prepared.args;
    args.q = moved("q", args.q, q);
    args.k = moved("k", args.k, k);
    args.v = moved("v", args.v, v);
    args.out = moved("out", args.out, out);
    CarriedKeys carried{.choice = moved("choice", prepared.carried.choice, choice),
                        .residual = moved("residual", prepared.carried.residual, residual)};
    const nb::gil_scoped_release released;
    const std::lock_guard lock(mutex_);
    backend_->run_on(pointer_to(stream), pointer_to(memory), prepared.bytes,
                     [&] { attend(prepared.call, args, carried); });
  }

  /// Backend::split_qkv: qkv (batch, tokens, 3 heads, channels), float32 on the CPU; q (batch, heads, tokens,
  /// channels); k and v (batch, heads, capacity, channels); head_scale: float32 (heads); rope: float32 (tokens,
  /// channels / 2, 2).
  PreparedSplit prepare_split(bool normalise, const In& qkv_, const Out& q_, const Out& k_, const Out& v_,
                              const std::optional<In>& head_scale, const std::optional<In>& rope) const {
    const Array4 qkv = array4("qkv", qkv_, false), q = array4("q", q_, false), k = array4("k_cache", k_, false),
                 v = array4("v_cache", v_, false);
    const std::int64_t batch = qkv.shape[0], n = qkv.shape[1], heads = qkv.shape[2] / 3, dim = qkv.shape[3];
    const auto expect = [](const Array4& a, const std::array<std::int64_t, 4>& shape) {
      if (a.shape != shape)
        throw Error(ErrorKind::usage, fmt::format("split_qkv: {} is {}, expected ({}, {}, {}, {})", a.name, a.text(),
                                                  shape[0], shape[1], shape[2], shape[3]));
    };
    expect(qkv, {batch, n, 3 * heads, dim});
    expect(q, {batch, heads, n, dim});
    expect(k, {batch, heads, k.shape[2], dim});
    expect(v, k.shape);
    const DType product_type = gpu_ < 0 ? DType::f32 : qkv.dtype;  // a GPU takes both
    for (const Array4* a : {&qkv, &q, &k, &v})
      if ((a->on_gpu ? a->device : -1) != gpu_ || a->dtype != (a == &qkv ? product_type : dtype_))
        throw Error(ErrorKind::usage, fmt::format("split_qkv: {} {} is not what was prepared", a->name, a->text()));
    PreparedSplit out{.qkv = qkv.tensor().reshaped({batch, n, 3, heads, dim}),
                      .q = q.tensor(),
                      .k = k.tensor(),
                      .v = v.tensor(),
                      .args = {.heads = static_cast<int>(heads),
                               .l2_norm = normalise,
                               .head_scale = carried_tensor("head_scale", head_scale, 1),
                               .rope = carried_tensor("rope", rope, 3)}};
    require_small("head_scale", out.args.head_scale, {heads});
    require_small("rope", out.args.rope, {n, dim / 2, 2});
    if (out.args.rope.defined() && dim % 2 != 0)
      throw Error(ErrorKind::usage, fmt::format("split_qkv: heads of {} channels cannot rotate", dim));
    return out;
  }

  /// Arrays at these addresses: q and rows [first, first + tokens) of k and v are written.
  void split_at(const PreparedSplit& prepared, std::int64_t first, std::uintptr_t stream, std::uintptr_t qkv,
                std::uintptr_t q_, std::uintptr_t k_, std::uintptr_t v_, std::uintptr_t head_scale,
                std::uintptr_t rope) {
    const std::int64_t n = prepared.q.dim(2), capacity = prepared.k.dim(2);
    if (first < 0 || first > capacity - n)
      throw Error(ErrorKind::usage,
                  fmt::format("split_qkv: {} rows from row {} do not fit k_cache, which has {}", n, first, capacity));
    QkvArgs args = prepared.args;
    args.offset = first;
    args.head_scale = moved(args.head_scale, head_scale);
    args.rope = moved(args.rope, rope);
    const Tensor product = moved("qkv", prepared.qkv, qkv);
    Tensor q = moved("q", prepared.q, q_), k = moved("k_cache", prepared.k, k_), v = moved("v_cache", prepared.v, v_);
    const nb::gil_scoped_release released;
    const std::lock_guard lock(mutex_);
    backend_->run_on(pointer_to(stream), nullptr, 0, [&] { backend_->split_qkv(product, args, q, k, v); });
  }

  /// Fills out, on the CPU. At a cs4a rule's decision scale choice and residual are written, above it they are read.
  void run(const Call& call, const In& q, const In& k, const In& v, const Out& out, bool words,
           const std::optional<In>& choice, const std::optional<In>& residual) {
    AttentionArgs args = args_of(call, q, k, v, out, words);
    CarriedKeys carried = carried_of(choice, residual);
    const nb::gil_scoped_release released;
    const std::lock_guard lock(mutex_);
    attend(call, args, carried);
  }

 private:
  void require_small(const char* name, const Tensor& x, const Shape& shape) const {
    if (!x.defined()) return;
    if (x.shape() != shape || x.dtype() != DType::f32 || (x.place() == Place::device) != (gpu_ >= 0))
      throw Error(ErrorKind::usage, fmt::format("split_qkv: {} is {} {}, expected float32 {} where qkv is", name,
                                                name_of(x.dtype()), to_string(x.shape()), to_string(shape)));
  }

  void check_scale(int scale) const {
    if (scale < 0 || scale >= static_cast<int>(schedule_.size()))
      throw Error(ErrorKind::usage, fmt::format("scale {}: the schedule has 0 to {}", scale, schedule_.size() - 1));
  }

  AttentionArgs args_of(const Call& call, const In& q, const In& k, const In& v, const Out& out, bool words) const {
    if (call.lists) return checked_args(call, q, k, v, out, words, call.lists->queries(), call.lists->keys);
    check_scale(call.scale);
    if (call.layer < 0 || call.layer > 4096)
      throw Error(ErrorKind::usage, fmt::format("layer {}: expected 0 to 4096", call.layer));
    return checked_args(call, q, k, v, out, words, schedule_[call.scale].tokens(), keys_[call.scale]);
  }

  AttentionArgs checked_args(const Call& call, const In& q_, const In& k_, const In& v_, const Out& out_, bool words,
                             std::int64_t queries, std::int64_t keys) const {
    const Array4 q = array4("q", q_, words), k = array4("k", k_, words), v = array4("v", v_, words);
    Array4 out = array4("out", out_, words);
    require_fit(q, k, v, out, queries, keys);
    if (q.dtype != dtype_ || (q.on_gpu ? q.device : -1) != gpu_)
      throw Error(ErrorKind::usage, fmt::format("attention: q {} is not what was prepared", q.text()));
    // (B, H, n, D) lies in memory as [B, n, H, D]: what a model's next layer reads.
    std::swap(out.shape[1], out.shape[2]);
    std::swap(out.strides[1], out.strides[2]);
    const std::int64_t heads = q.shape[1];
    AttentionArgs args;
    args.q = q.tensor();
    args.k = k.cache(heads);
    args.v = v.cache(heads);
    args.out = out.tensor();
    if (args.k.shape() != args.v.shape())
      throw Error(ErrorKind::usage,
                  "attention: k and v are parts of caches of different capacities; make them "
                  "contiguous");
    args.scale = call.logit_scale;
    return args;
  }

  static Tensor carried_tensor(const char* name, const std::optional<In>& array, std::size_t dimensions) {
    if (!array || array->size() == 0) return {};
    if (array->ndim() != dimensions)
      throw Error(ErrorKind::usage,
                  fmt::format("attention: {}: expected {} dimensions, found {}", name, dimensions, array->ndim()));
    Shape shape;
    std::int64_t packed = 1;
    for (std::size_t axis = 0; axis < dimensions; ++axis) shape.push_back(array->shape(axis));
    for (std::size_t axis = dimensions; axis-- > 0; packed *= shape[axis])
      if (shape[axis] != 1 && array->stride(axis) != packed)
        throw Error(ErrorKind::usage, fmt::format("attention: {} is not contiguous", name));
    const nb::dlpack::dtype type = array->dtype();
    DType dtype = DType::f32;
    if (type == nb::dtype<std::int32_t>())
      dtype = DType::i32;
    else if (type.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat) && type.bits == 16)
      dtype = DType::bf16;
    else if (type != nb::dtype<float>())
      throw Error(ErrorKind::usage, fmt::format("attention: {} is of a type of {} bits; expected float32, bfloat16 or "
                                                "int32",
                                                name, type.bits));
    return {const_cast<void*>(array->data()), dtype, std::move(shape), nullptr,
            array->device_type() == nb::device::cuda::value ? Place::device : Place::host};
  }

  static CarriedKeys carried_of(const std::optional<In>& choice, const std::optional<In>& residual) {
    return {.choice = carried_tensor("choice", choice, 3), .residual = carried_tensor("residual", residual, 4)};
  }

  void attend(const Call& call, AttentionArgs args, const CarriedKeys& carried) {
    if (call.lists) {
      AttentionListsPtr& known = prepared_[call.lists];
      if (!known) known = backend_->prepare_lists(call.lists->tiles, call.lists->lists);
      return backend_->attention(args, *known);
    }
    const auto* cs4a = std::get_if<Cs4aAttention>(&plan_.method(call.layer, call.scale));
    const bool reads = cs4a != nullptr && call.scale > cs4a->decision_scale;
    const bool writes = cs4a != nullptr && call.scale == cs4a->decision_scale;
    if ((reads || writes) && !carried.choice.defined())
      throw Error(ErrorKind::usage, "attention: cs4a needs what was chosen at its decision scale");
    if (reads || writes) require_carried(call, *cs4a, args, carried);
    if (reads) require_keys(*cs4a, carried.choice);
    if (reads) runner_->carry(call.layer, carried);
    struct Release {
      AttentionRunner& runner;
      ~Release() { runner.release(); }
    } const release{*runner_};
    runner_->run(call.layer, call.scale, args, writes ? carried : CarriedKeys{});
  }

  /// What is followed blindly by the kernels is checked: sizes here.
  void require_carried(const Call& call, const Cs4aAttention& method, const AttentionArgs& args,
                       const CarriedKeys& carried) const {
    const Grid grid = schedule_[method.decision_scale];
    const std::int64_t heads = args.q.dim(1);
    const bool fits = carried.choice.dtype() == DType::i32 && carried.choice.dim(0) >= args.q.dim(0) * heads &&
                      carried.choice.dim(1) == group_tiles(grid, method.group).count() &&
                      carried.choice.dim(2) == counts_to_choose(method, schedule_).front();
    const bool residual_fits = !carried.residual.defined() ||
                               (carried.residual.dim(0) >= args.q.dim(0) && carried.residual.dim(1) == grid.tokens() &&
                                carried.residual.dim(2) == heads && carried.residual.dim(3) == args.q.dim(3));
    if (!fits || !residual_fits || carried.residual.defined() != method.residual)
      throw Error(ErrorKind::usage,
                  fmt::format("attention: what is carried does not belong to layer {} of plan {} with q {}", call.layer,
                              plan_.name, to_string(args.q.shape())));
  }

  /// On the CPU; a GPU's are not looked at.
  void require_keys(const Cs4aAttention& method, const Tensor& choice) const {
    if (choice.place() == Place::device) return;
    const auto* keys = choice.data<std::int32_t>();
    for (std::int64_t i = 0; i < choice.size(); ++i)
      if (keys[i] < 0 || keys[i] >= keys_[method.decision_scale])
        throw Error(ErrorKind::usage,
                    fmt::format("attention: a carried key {} of {}", keys[i], keys_[method.decision_scale]));
  }

  AttentionPlan plan_;
  ScaleSchedule schedule_;
  DType dtype_;
  int gpu_ = -1;
  std::vector<int> keys_;
  std::mutex mutex_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<AttentionRunner> runner_;
  std::map<std::shared_ptr<Lists>, AttentionListsPtr> prepared_;
};

}  // namespace

void bind_attention(nb::module_& m) {
  nb::class_<ListKernel>(m, "ListKernel", "Attention by lists on the CPU, for one shape.")
      .def(
          "__init__",
          [](ListKernel* self, const std::shared_ptr<Lists>& lists, int batch, int heads, int head_dim, bool bf16,
             float scale, int threads) { new (self) ListKernel(lists, batch, heads, head_dim, bf16, scale, threads); },
          nb::arg("lists"), nb::arg("batch"), nb::arg("heads"), nb::arg("head_dim"), nb::arg("bf16"), nb::arg("scale"),
          nb::arg("threads"))
      .def("run", &ListKernel::run, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("out"), nb::arg("words"));
  nb::class_<Call>(m, "Call", "Which attention: layer, scale, factor of the logits.")
      .def(
          "__init__",
          [](Call* self, int layer, int scale, float logit_scale, std::shared_ptr<Lists> lists) {
            new (self) Call{layer, scale, logit_scale, std::move(lists)};
          },
          nb::arg("layer"), nb::arg("scale"), nb::arg("logit_scale"), nb::arg("lists").none() = nb::none());
  nb::class_<PreparedCall>(m, "PreparedCall", "A call whose arrays were checked; they may lie elsewhere.")
      .def_ro("bytes", &PreparedCall::bytes, "Of working memory; 0 on the CPU.");
  const nb::class_<PreparedSplit> prepared_split(m, "PreparedSplit",
                                                 "The same of q, k and v that are made of a qkv product.");
  nb::class_<PlanKernel>(m, "PlanKernel", "Attention by a plan on one device.")
      .def(
          "__init__",
          [](PlanKernel* self, const AttentionPlan& plan, const Grids& schedule, const std::string& device, bool bf16) {
            new (self) PlanKernel(plan, schedule, device, bf16);
          },
          nb::arg("plan"), nb::arg("schedule"), nb::arg("device"), nb::arg("bf16"))
      .def("carried_shapes", &PlanKernel::carried_shapes, nb::arg("layer"), nb::arg("scale"), nb::arg("batch"),
           nb::arg("heads"), nb::arg("head_dim"))
      .def("prepare", &PlanKernel::prepare, nb::arg("call"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("out"),
           nb::arg("choice").none(), nb::arg("residual").none())
      .def("run_at", &PlanKernel::run_at, "Addresses; 0: there is none.", nb::arg("prepared"), nb::arg("stream"),
           nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("out"), nb::arg("choice"), nb::arg("residual"),
           nb::arg("memory"))
      .def("prepare_split", &PlanKernel::prepare_split, nb::arg("normalise"), nb::arg("qkv"), nb::arg("q"),
           nb::arg("k_cache"), nb::arg("v_cache"), nb::arg("head_scale").none(), nb::arg("rope").none())
      .def("split_at", &PlanKernel::split_at, "Addresses; 0: there is none.", nb::arg("prepared"), nb::arg("first"),
           nb::arg("stream"), nb::arg("qkv"), nb::arg("q"), nb::arg("k_cache"), nb::arg("v_cache"),
           nb::arg("head_scale"), nb::arg("rope"))
      .def("run", &PlanKernel::run, nb::arg("call"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("out"),
           nb::arg("words"), nb::arg("choice").none(), nb::arg("residual").none());
}

}  // namespace sparvar::python
