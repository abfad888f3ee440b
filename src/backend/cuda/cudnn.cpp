#include "backend/cuda/cudnn.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <map>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "backend/cuda/check.h"
#include "backend/cuda/library.h"

// The frontend opens libcudart by name. Ours is linked in statically, so its two calls for that are answered here.
namespace sparvar::cuda::frontend {
namespace {

char own_runtime;  // its address is the handle

void* open(const char* name, int mode) {
  const std::string_view wanted = name;
  if (!wanted.starts_with("libcudart.so")) return ::dlopen(name, mode);
  return wanted.ends_with("." + std::to_string(CUDART_VERSION / 1000)) ? &own_runtime : nullptr;
}

void* symbol(void* library, const char* name) {
  if (library != &own_runtime) return ::dlsym(library, name);
  struct Function {
    std::string_view name;
    void* address;
  };
#define SPARVAR_FUNCTION(name) \
  Function { #name, reinterpret_cast < void*>(&::name) }
  static const Function functions[] = {
    SPARVAR_FUNCTION(cudaRuntimeGetVersion),
    SPARVAR_FUNCTION(cudaGetDevice),
    SPARVAR_FUNCTION(cudaDeviceGetAttribute),
    SPARVAR_FUNCTION(cudaGetErrorString),
    SPARVAR_FUNCTION(cudaGetLastError),
    SPARVAR_FUNCTION(cudaStreamIsCapturing),
    SPARVAR_FUNCTION(cudaThreadExchangeStreamCaptureMode),
    SPARVAR_FUNCTION(cudaMemcpyAsync),
    SPARVAR_FUNCTION(cudaMemsetAsync),
    SPARVAR_FUNCTION(cudaPointerGetAttributes),
    SPARVAR_FUNCTION(cudaDeviceSynchronize),
    SPARVAR_FUNCTION(cudaStreamSynchronize),
#if CUDART_VERSION >= 12080
    SPARVAR_FUNCTION(cudaGetDriverEntryPointByVersion),
#endif
  };
#undef SPARVAR_FUNCTION
  for (const Function& function : functions)
    if (function.name == name) return function.address;
  return nullptr;
}

}  // namespace
}  // namespace sparvar::cuda::frontend

#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#define dlopen sparvar::cuda::frontend::open
#define dlsym sparvar::cuda::frontend::symbol
#include <cudnn_frontend.h>
#undef dlopen
#undef dlsym

void* cudnn_frontend::cudnn_dlhandle = nullptr;

namespace sparvar::cuda {
namespace {

namespace fe = cudnn_frontend;
using fe::graph::Tensor_attributes;
using Pointers = std::unordered_map<std::int64_t, void*>;
using Extents = std::vector<std::int64_t>;

enum Uid : std::int64_t { kX = 1, kW, kBias, kResidual, kY, kQ, kK, kV, kOut };

/// First line of a message of the library.
std::string first_line(const std::string& message) {
  return message.substr(0, std::min(message.find('\n'), std::size_t{400}));
}

void require(fe::error_t status) {
  if (status.is_bad()) throw std::runtime_error(first_line(status.get_message()));
}

std::string text_of(const Cudnn::ConvolutionShape& s) {
  return fmt::format("convolution of {} [{}, {}, {}, {}] to {} channels, {} x {}, stride {}", name_of(s.type), s.batch,
                     s.height, s.width, s.in, s.out, s.kernel_h, s.kernel_w, s.stride);
}
std::string text_of(const Cudnn::AttentionShape& s) {
  return fmt::format("attention [{}, {}, {} x {}, {}]", s.batch, s.heads, s.queries, s.keys, s.dim);
}

/// While it lives a kernel may be loaded in the middle of a capture.
class Relaxed {
 public:
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// Runs f; what it throws becomes an error about `shape`.
template <typename Shape, typename F>
auto about(const Shape& shape, F f) {
  const Relaxed relaxed;
  try {
    return f();
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Error(ErrorKind::system, fmt::format("cuDNN: {}: {}", text_of(shape), first_line(error.what())));
  }
}

/// A graph and the candidate of its heuristics that is used.
struct Plan {
  std::unique_ptr<fe::graph::Graph> graph;
  std::int64_t candidate = -1;  // none: cuDNN has no engine
  std::int64_t workspace = 0;
  bool fused = true;  // the graph has bias and residual in it
  std::string why;    // where there is none

  bool usable() const { return candidate >= 0; }
  /// Builds candidate `index`; false where it cannot be used within `most` bytes.
  bool build(std::int64_t index, std::int64_t most, std::int64_t& bytes) {
    fe::error_t built = graph->build_plan_at_index(index);
    if (built.is_bad()) {
      why = first_line(built.get_message());
      return false;
    }
    return graph->get_workspace_size_plan_at_index(index, bytes).is_good() && bytes <= most;
  }
};

std::unique_ptr<fe::graph::Graph> new_graph(fe::DataType_t type) {
  auto graph = std::make_unique<fe::graph::Graph>();
  graph->set_io_data_type(type)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  graph->set_cuda_graph_retention(fe::CudaGraphRetention_t::NONE);  // plans live as long as the backend
  return graph;
}

/// The first plan of mode A, else of the fallback list, that can be built. `make` makes the graph.
template <typename Make>
Plan first_plan(cudnnHandle_t handle, bool precise, Make make) {
  Plan plan;
  for (const fe::HeurMode_t mode : {fe::HeurMode_t::A, fe::HeurMode_t::FALLBACK}) try {
      plan.graph = make();
      require(plan.graph->validate());
      require(plan.graph->build_operation_graph(handle));
      require(plan.graph->create_execution_plans({mode}));
      if (precise)
        plan.graph->deselect_numeric_notes({fe::NumericalNote_t::TENSOR_CORE, fe::NumericalNote_t::DOWN_CONVERT_INPUTS,
                                            fe::NumericalNote_t::REDUCED_PRECISION_REDUCTION});
      for (std::int64_t i = 0; i < plan.graph->get_execution_plan_count(); ++i)
        if (plan.build(i, std::numeric_limits<std::int64_t>::max(), plan.workspace)) {
          plan.candidate = i;
          return plan;
        }
    } catch (const std::exception& error) {
      plan.why = first_line(error.what());
    }
  plan.graph.reset();
  return plan;
}

std::shared_ptr<Tensor_attributes> tensor(fe::graph::Graph& graph, Uid uid, const char* name, Extents dims,
                                          Extents strides, fe::DataType_t type) {
  return graph.tensor(
      Tensor_attributes().set_uid(uid).set_name(name).set_dim(dims).set_stride(strides).set_data_type(type));
}

/// Strides of dense NHWC for extents in cuDNN's order (n, c, h, w).
Extents nhwc(const Extents& dims) { return {dims[1] * dims[2] * dims[3], 1, dims[1] * dims[3], dims[1]}; }

Extents result_dims(const Cudnn::ConvolutionShape& s) { return {s.batch, s.out, s.out_height(), s.out_width()}; }

Extents result_strides(const Cudnn::ConvolutionShape& s) {
  Extents strides = nhwc(result_dims(s));
  if (s.out_stride_n != 0) strides[0] = s.out_stride_n;
  if (s.out_stride_h != 0) strides[2] = s.out_stride_h;
  if (s.out_stride_w != 0) strides[3] = s.out_stride_w;
  return strides;
}

std::unique_ptr<fe::graph::Graph> convolution_graph(const Cudnn::ConvolutionShape& s, bool fused) {
  const fe::DataType_t type = s.type == DType::f32 ? fe::DataType_t::FLOAT : fe::DataType_t::BFLOAT16;
  auto graph = new_graph(type);
  const Extents x_dims = {s.batch, s.in, s.height, s.width};
  const Extents w_dims = {s.out, s.in, s.kernel_h, s.kernel_w};
  const auto x = tensor(*graph, kX, "x", x_dims, nhwc(x_dims), type);
  const auto w = tensor(*graph, kW, "w", w_dims, nhwc(w_dims), type);
  auto y = graph->conv_fprop(x, w,
                             fe::graph::Conv_fprop_attributes()
                                 .set_pre_padding({s.pad_top, s.pad_left})
                                 .set_post_padding({s.pad_bottom, s.pad_right})
                                 .set_stride({s.stride, s.stride})
                                 .set_dilation({1, 1}));
  if (fused) {
    const auto add = [&](const std::shared_ptr<Tensor_attributes>& more) {
      y->set_data_type(fe::DataType_t::FLOAT);  // of a value that is not written
      y = graph->pointwise(y, more, fe::graph::Pointwise_attributes().set_mode(fe::PointwiseMode_t::ADD));
    };
    const Extents bias_dims = {1, s.out, 1, 1};
    add(tensor(*graph, kBias, "bias", bias_dims, nhwc(bias_dims), fe::DataType_t::FLOAT));
    const Extents dims = result_dims(s);
    if (s.residual) add(tensor(*graph, kResidual, "residual", dims, nhwc(dims), type));
  }
  y->set_output(true).set_uid(kY).set_dim(result_dims(s)).set_stride(result_strides(s)).set_data_type(type);
  return graph;
}

std::unique_ptr<fe::graph::Graph> attention_graph(const Cudnn::AttentionShape& s) {
  auto graph = new_graph(fe::DataType_t::BFLOAT16);
  const Extents q_dims = {s.batch, s.heads, s.queries, s.dim};
  const Extents k_dims = {s.batch, s.heads, s.keys, s.dim};
  const Extents k_strides = {s.k_batch, s.k_head, s.k_row, 1};
  const auto q = tensor(*graph, kQ, "q", q_dims, {s.q_batch, s.q_head, s.q_row, 1}, fe::DataType_t::BFLOAT16);
  const auto k = tensor(*graph, kK, "k", k_dims, k_strides, fe::DataType_t::BFLOAT16);
  const auto v = tensor(*graph, kV, "v", k_dims, k_strides, fe::DataType_t::BFLOAT16);
  auto options = fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(false).set_attn_scale(s.scale);
  const auto out = graph->sdpa(q, k, v, options)[0];
  out->set_output(true)
      .set_uid(kOut)
      .set_dim(q_dims)
      .set_stride({s.out_batch, s.out_head, s.out_row, 1})
      .set_data_type(fe::DataType_t::BFLOAT16);
  return graph;
}

/// Two events of which the time between is asked for.
class Stopwatch {
 public:
  explicit Stopwatch(cudaStream_t stream) : stream_(stream) {
    check(cudaEventCreate(&start_), "event");
    check(cudaEventCreate(&stop_), "event");
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  ~Stopwatch() {
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
  }
  /// Milliseconds of one of `times` calls.
  template <typename F>
  float measure(int times, F f) {
    check(cudaEventRecord(start_, stream_), "event");
    for (int i = 0; i < times; ++i) f();
    check(cudaEventRecord(stop_, stream_), "event");
    check(cudaEventSynchronize(stop_), "measuring a convolution");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start_, stop_), "event");
    return milliseconds / static_cast<float>(times);
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t start_ = nullptr;
  cudaEvent_t stop_ = nullptr;
};

}  // namespace

struct Cudnn::State {
  cudaStream_t stream = nullptr;
  cudnnHandle_t handle = nullptr;
  std::map<ConvolutionShape, Plan> convolutions;
  std::map<AttentionShape, Plan> attentions;

  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() {
    convolutions.clear();
    attentions.clear();
    if (handle != nullptr) fe::detail::destroy_handle(handle);
  }

  Plan& plan(const ConvolutionShape& shape) {
    const auto found = convolutions.find(shape);
    if (found != convolutions.end()) return found->second;
    const bool precise = shape.type == DType::f32;
    Plan plan = first_plan(handle, precise, [&] { return convolution_graph(shape, true); });
    if (!plan.usable()) {
      plan = first_plan(handle, precise, [&] { return convolution_graph(shape, false); });
      plan.fused = false;
    }
    return convolutions.emplace(shape, std::move(plan)).first->second;
  }
  Plan& plan(const AttentionShape& shape) {
    const auto found = attentions.find(shape);
    if (found != attentions.end()) return found->second;
    Plan plan;
    if (shape.queries > 0 && shape.keys > 0) plan = first_plan(handle, false, [&] { return attention_graph(shape); });
    return attentions.emplace(shape, std::move(plan)).first->second;
  }
  template <typename Shape>
  Plan& usable_plan(const Shape& shape) {
    Plan& found = plan(shape);
    if (!found.usable()) throw std::runtime_error("no engine: " + found.why);
    return found;
  }

  void run(const Plan& plan, std::int64_t candidate, Pointers& pointers, void* workspace) const {
    require(plan.graph->execute_plan_at_index(handle, pointers, workspace, candidate));
  }
  void run_convolution(const ConvolutionShape& shape, const Plan& plan, std::int64_t candidate, Pointers& pointers,
                       void* workspace) const {
    run(plan, candidate, pointers, workspace);
    if (plan.fused) return;
    const Extents strides = result_strides(shape);
    add_bias_and_residual({.batch = shape.batch,
                           .height = shape.out_height(),
                           .width = shape.out_width(),
                           .channels = shape.out,
                           .type = shape.type,
                           .stride_n = strides[0],
                           .stride_h = strides[2],
                           .stride_w = strides[3]},
                          static_cast<const float*>(pointers.at(kBias)), pointers.at(kResidual), pointers.at(kY),
                          stream);
  }
};

namespace {

Pointers convolution_pointers(const Cudnn::ConvolutionShape& shape, const void* x, const void* w, const float* bias,
                              const void* residual, void* y) {
  return {{kX, const_cast<void*>(x)},
          {kW, const_cast<void*>(w)},
          {kBias, const_cast<float*>(bias)},
          {kResidual, shape.residual ? const_cast<void*>(residual) : nullptr},
          {kY, y}};
}

}  // namespace

Cudnn::Cudnn(std::unique_ptr<State> state) : state_(std::move(state)) {}
Cudnn::~Cudnn() = default;

std::unique_ptr<Cudnn> Cudnn::load(cudaStream_t stream, std::string& why) {
  const std::string name = fmt::format("libcudnn.so.{}", CUDNN_MAJOR);
  try {
    if (fe::cudnn_dlhandle == nullptr) {
      // Some engines compile their kernels; cuDNN finds the compiler if it is open by then.
      open_library(fmt::format("libnvrtc.so.{}", CUDART_VERSION / 1000));
      fe::cudnn_dlhandle = open_library(name);
    }
    if (fe::cudnn_dlhandle == nullptr) {
      const char* reason = dlerror();
      why = fmt::format("{} cannot be loaded: {}", name, reason == nullptr ? "not found" : reason);
      return nullptr;
    }
    auto state = std::make_unique<State>();
    state->stream = stream;
    cudnnStatus_t status = fe::detail::create_handle(&state->handle);
    if (status == CUDNN_STATUS_SUCCESS) status = fe::detail::set_stream(state->handle, stream);
    if (status != CUDNN_STATUS_SUCCESS) {
      why = fmt::format("{} cannot be used: {}", name, fe::detail::get_error_string(status));
      return nullptr;
    }
    return std::unique_ptr<Cudnn>(new Cudnn(std::move(state)));
  } catch (const std::exception& error) {
    why = fmt::format("{} cannot be used: {}", name, first_line(error.what()));
    return nullptr;
  }
}

std::string Cudnn::version() const { return fe::detail::get_backend_version_string(); }

bool Cudnn::supports_convolution(const ConvolutionShape& shape) {
  return about(shape, [&] { return state_->plan(shape).usable(); });
}

std::int64_t Cudnn::convolution_workspace(const ConvolutionShape& shape) {
  return about(shape, [&] { return state_->usable_plan(shape).workspace; });
}

void Cudnn::convolution(const ConvolutionShape& shape, const void* x, const void* w, const float* bias,
                        const void* residual, void* y, void* workspace) {
  about(shape, [&] {
    const Plan& plan = state_->usable_plan(shape);
    Pointers pointers = convolution_pointers(shape, x, w, bias, residual, y);
    state_->run_convolution(shape, plan, plan.candidate, pointers, workspace);
  });
}

void Cudnn::tune(const ConvolutionShape& shape, const void* x, const void* w, const float* bias, const void* residual,
                 void* y, void* workspace, std::int64_t max_workspace) {
  constexpr std::int64_t kCandidates = 8;  // compiling one can take a second
  constexpr float kMilliseconds = 10;      // of measuring each
  about(shape, [&] {
    Plan& plan = state_->usable_plan(shape);
    Pointers pointers = convolution_pointers(shape, x, w, bias, residual, y);
    Stopwatch stopwatch(state_->stream);
    float best = std::numeric_limits<float>::max();
    const std::int64_t count = std::min(kCandidates, plan.graph->get_execution_plan_count());
    for (std::int64_t i = 0; i < count; ++i) try {
        std::int64_t bytes = 0;
        if (!plan.build(i, max_workspace, bytes)) continue;
        const auto call = [&] { state_->run_convolution(shape, plan, i, pointers, workspace); };
        call();  // loads the kernel
        const float once = stopwatch.measure(1, call);
        const int times = std::clamp(static_cast<int>(kMilliseconds / std::max(once, 1e-3F)), 1, 20);
        const float time = std::min(once, stopwatch.measure(times, call));
        if (time >= best) continue;
        best = time;
        plan.candidate = i;
        plan.workspace = bytes;
      } catch (const std::exception&) {
        cudaGetLastError();  // this candidate cannot be used; the next may
      }
  });
}

bool Cudnn::supports_attention(const AttentionShape& shape) {
  return about(shape, [&] { return state_->plan(shape).usable(); });
}

std::int64_t Cudnn::attention_workspace(const AttentionShape& shape) {
  return about(shape, [&] { return state_->usable_plan(shape).workspace; });
}

void Cudnn::attention(const AttentionShape& shape, const void* q, const void* k, const void* v, void* out,
                      void* workspace) {
  about(shape, [&] {
    const Plan& plan = state_->usable_plan(shape);
    Pointers pointers = {
        {kQ, const_cast<void*>(q)}, {kK, const_cast<void*>(k)}, {kV, const_cast<void*>(v)}, {kOut, out}};
    state_->run(plan, plan.candidate, pointers, workspace);
  });
}

}  // namespace sparvar::cuda
