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

enum Uid : std::int64_t { kX = 1, kW, kBias, kResidual, kY, kQ, kK, kV, kOut, kLogSums };

/// First line of a message of the library.
std::string first_line(const std::string& message) {
  return message.substr(0, std::min(message.find('\n'), std::size_t{400}));
}

void require(fe::error_t status) {
  if (status.is_bad()) throw std::runtime_error(first_line(status.get_message()));
}

std::string text_of(const Cudnn::ConvolutionShape& s) {
  return fmt::format("convolution of [{}, {}, {}, {}] to {} channels, {} x {}, stride {}", s.batch, s.height, s.width,
                     s.in, s.out, s.kernel, s.kernel, s.stride);
}
std::string text_of(const Cudnn::AttentionShape& s) {
  return fmt::format("attention [{}, {}, {} x {}, {}]", s.batch, s.heads, s.queries, s.keys, s.dim);
}

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
  std::string why;  // where there is none

  bool usable() const { return candidate >= 0; }
  bool build(std::int64_t index) {
    fe::error_t built = graph->build_plan_at_index(index);
    if (built.is_good()) built = graph->get_workspace_size_plan_at_index(index, workspace);
    if (built.is_bad()) why = first_line(built.get_message());
    return built.is_good();
  }
};

std::unique_ptr<fe::graph::Graph> new_graph() {
  auto graph = std::make_unique<fe::graph::Graph>();
  graph->set_io_data_type(fe::DataType_t::BFLOAT16)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  graph->set_cuda_graph_retention(fe::CudaGraphRetention_t::NONE);  // plans live as long as the backend
  return graph;
}

/// The first plan of mode A, else of the fallback list, that can be built. `make` makes the graph.
template <typename Make>
Plan first_plan(cudnnHandle_t handle, Make make) {
  Plan plan;
  for (const fe::HeurMode_t mode : {fe::HeurMode_t::A, fe::HeurMode_t::FALLBACK}) try {
      plan.graph = make();
      require(plan.graph->validate());
      require(plan.graph->build_operation_graph(handle));
      require(plan.graph->create_execution_plans({mode}));
      for (std::int64_t i = 0; i < plan.graph->get_execution_plan_count(); ++i)
        if (plan.build(i)) {
          plan.candidate = i;
          return plan;
        }
    } catch (const std::exception& error) {
      plan.why = first_line(error.what());
    }
  plan.graph.reset();
  return plan;
}

std::shared_ptr<Tensor_attributes> tensor(fe::graph::Graph& graph, Uid uid, const char* name, const Extents& dims,
                                          const Extents& strides, fe::DataType_t type) {
  return graph.tensor(
      Tensor_attributes().set_uid(uid).set_name(name).set_dim(dims).set_stride(strides).set_data_type(type));
}

/// Strides of dense NHWC for extents in cuDNN's order (n, c, h, w).
Extents nhwc(const Extents& dims) { return {dims[1] * dims[2] * dims[3], 1, dims[1] * dims[3], dims[1]}; }

std::unique_ptr<fe::graph::Graph> convolution_graph(const Cudnn::ConvolutionShape& s) {
  constexpr fe::DataType_t kType = fe::DataType_t::BFLOAT16;
  auto graph = new_graph();
  const Extents x_dims = {s.batch, s.in, s.height, s.width};
  const Extents w_dims = {s.out, s.in, s.kernel, s.kernel};
  const Extents y_dims = {s.batch, s.out, s.out_height(), s.out_width()};
  const auto x = tensor(*graph, kX, "x", x_dims, nhwc(x_dims), kType);
  const auto w = tensor(*graph, kW, "w", w_dims, nhwc(w_dims), kType);
  auto y = graph->conv_fprop(x, w,
                             fe::graph::Conv_fprop_attributes()
                                 .set_pre_padding({s.pad_begin, s.pad_begin})
                                 .set_post_padding({s.pad_end, s.pad_end})
                                 .set_stride({s.stride, s.stride})
                                 .set_dilation({1, 1}));
  const auto add = [&](const std::shared_ptr<Tensor_attributes>& more) {
    y->set_data_type(fe::DataType_t::FLOAT);  // of a value that is not written
    y = graph->pointwise(y, more, fe::graph::Pointwise_attributes().set_mode(fe::PointwiseMode_t::ADD));
  };
  const Extents bias_dims = {1, s.out, 1, 1};
  add(tensor(*graph, kBias, "bias", bias_dims, nhwc(bias_dims), fe::DataType_t::FLOAT));
  if (s.residual) add(tensor(*graph, kResidual, "residual", y_dims, nhwc(y_dims), kType));
  y->set_output(true).set_uid(kY).set_dim(y_dims).set_stride(nhwc(y_dims)).set_data_type(kType);
  return graph;
}

std::unique_ptr<fe::graph::Graph> attention_graph(const Cudnn::AttentionShape& s) {
  auto graph = new_graph();
  const Extents q_dims = {s.batch, s.heads, s.queries, s.dim};
  const Extents k_dims = {s.batch, s.heads, s.keys, s.dim};
  const Extents k_strides = {s.k_batch, s.k_head, s.k_row, 1};
  const auto q = tensor(*graph, kQ, "q", q_dims, {s.q_batch, s.q_head, s.q_row, 1}, fe::DataType_t::BFLOAT16);
  const auto k = tensor(*graph, kK, "k", k_dims, k_strides, fe::DataType_t::BFLOAT16);
  const auto v = tensor(*graph, kV, "v", k_dims, k_strides, fe::DataType_t::BFLOAT16);
  auto options =
      fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(s.statistics).set_attn_scale(s.scale);
  const auto [out, log_sums] = graph->sdpa(q, k, v, options);
  if (s.statistics)
    log_sums->set_output(true)
        .set_uid(kLogSums)
        .set_dim({s.batch, s.heads, s.queries, 1})
        .set_stride({s.heads * s.queries, s.queries, 1, 1})
        .set_data_type(fe::DataType_t::FLOAT);
  out->set_output(true)
      .set_uid(kOut)
      .set_dim(q_dims)
      .set_stride({s.out_batch, s.out_head, s.out_row, 1})
      .set_data_type(fe::DataType_t::BFLOAT16);
  return graph;
}

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
    return convolutions.emplace(shape, first_plan(handle, [&] { return convolution_graph(shape); })).first->second;
  }
  Plan& plan(const AttentionShape& shape) {
    const auto found = attentions.find(shape);
    if (found != attentions.end()) return found->second;
    Plan plan;
    if (shape.queries > 0 && shape.keys > 0) plan = first_plan(handle, [&] { return attention_graph(shape); });
    return attentions.emplace(shape, std::move(plan)).first->second;
  }
  template <typename Shape>
  Plan& usable_plan(const Shape& shape) {
    Plan& found = plan(shape);
    if (!found.usable()) throw std::runtime_error("no engine: " + found.why);
    return found;
  }

  void run(const Plan& plan, Pointers& pointers, void* workspace) const {
    require(plan.graph->execute_plan_at_index(handle, pointers, workspace, plan.candidate));
  }
};

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

void Cudnn::use(cudaStream_t stream) {
  if (stream == state_->stream) return;
  if (fe::detail::set_stream(state_->handle, stream) != CUDNN_STATUS_SUCCESS)
    throw Error(ErrorKind::system, "cuDNN cannot change to another stream");
  state_->stream = stream;
}

bool Cudnn::supports_convolution(const ConvolutionShape& shape) {
  return about(shape, [&] { return state_->plan(shape).usable(); });
}

std::int64_t Cudnn::convolution_workspace(const ConvolutionShape& shape) {
  return about(shape, [&] { return state_->usable_plan(shape).workspace; });
}

void Cudnn::convolution(const ConvolutionShape& shape, const void* x, const void* w, const float* bias,
                        const void* residual, void* y, void* workspace) {
  about(shape, [&] {
    Pointers pointers = {
        {kX, const_cast<void*>(x)}, {kW, const_cast<void*>(w)}, {kBias, const_cast<float*>(bias)}, {kY, y}};
    if (shape.residual) pointers[kResidual] = const_cast<void*>(residual);
    state_->run(state_->usable_plan(shape), pointers, workspace);
  });
}

bool Cudnn::supports_attention(const AttentionShape& shape) {
  return about(shape, [&] { return state_->plan(shape).usable(); });
}

std::int64_t Cudnn::attention_workspace(const AttentionShape& shape) {
  return about(shape, [&] { return state_->usable_plan(shape).workspace; });
}

void Cudnn::attention(const AttentionShape& shape, const void* q, const void* k, const void* v, void* out,
                      float* log_sums, void* workspace) {
  about(shape, [&] {
    const Plan& plan = state_->usable_plan(shape);
    Pointers pointers = {
        {kQ, const_cast<void*>(q)}, {kK, const_cast<void*>(k)}, {kV, const_cast<void*>(v)}, {kOut, out}};
    if (shape.statistics) pointers[kLogSums] = log_sums;
    state_->run(plan, pointers, workspace);
  });
}

}  // namespace sparvar::cuda
