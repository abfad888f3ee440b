// The device, programs as CUDA graphs, marks as events, memory before work.
#include <fmt/format.h>

#include "backend/cuda/check.h"
#include "backend/cuda/cuda_backend.h"

namespace sparvar {
namespace cuda {

/// Recorded at its first run; holds the pool, whose addresses are in the graph.
class CudaProgram final : public Program {
 public:
  CudaProgram(CudaBackend& backend, std::function<void()> body) : backend_(backend), body_(std::move(body)) {}
  CudaProgram(const CudaProgram&) = delete;
  CudaProgram& operator=(const CudaProgram&) = delete;
  ~CudaProgram() override {
    if (graph_ != nullptr) (void)cudaGraphExecDestroy(graph_);
  }

  void run() override {
    if (!backend_.computes()) return body_();
    if (graph_ == nullptr) record();
    check(cudaGraphLaunch(graph_, backend_.stream_), "starting a recorded program");
  }

 private:
  void record() {
    ++backend_.recordings_;
    pool_ = backend_.working_;
    check(cudaStreamBeginCapture(backend_.stream_, cudaStreamCaptureModeThreadLocal), "recording");
    backend_.recording_ = true;
    pool_->set_fixed(true);
    std::exception_ptr failure;
    try {
      body_();
    } catch (...) {
      failure = std::current_exception();
    }
    pool_->set_fixed(false);
    backend_.recording_ = false;
    cudaGraph_t recorded = nullptr;
    const cudaError_t status = cudaStreamEndCapture(backend_.stream_, &recorded);
    if (!failure && status == cudaSuccess) {
      const cudaError_t made = cudaGraphInstantiate(&graph_, recorded, 0);
      (void)cudaGraphDestroy(recorded);
      check(made, "preparing a recorded program");
      check(cudaGraphUpload(graph_, backend_.stream_), "uploading a recorded program");
      return;
    }
    if (recorded != nullptr) (void)cudaGraphDestroy(recorded);
    (void)cudaGetLastError();
    if (failure) std::rethrow_exception(failure);
    check(status, "recording");
  }

  CudaBackend& backend_;
  std::function<void()> body_;
  std::shared_ptr<Pool> pool_;
  cudaGraphExec_t graph_ = nullptr;
};

namespace {

class CudaMark final : public Mark {
 public:
  explicit CudaMark(cudaStream_t stream) {
    check(cudaEventCreate(&event_), "an event");
    check(cudaEventRecord(event_, stream), "an event");
  }
  CudaMark(const CudaMark&) = delete;
  CudaMark& operator=(const CudaMark&) = delete;
  ~CudaMark() override { (void)cudaEventDestroy(event_); }

  double seconds_since(const Mark& earlier) const override {
    check(cudaEventSynchronize(event_), "waiting for the GPU");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, dynamic_cast<const CudaMark&>(earlier).event_, event_), "timing");
    return milliseconds * 1e-3;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

constexpr std::size_t kWeightStep = 32U << 20;
constexpr std::size_t kWorkingStep = 16U << 20;

}  // namespace

CudaBackend::CudaBackend(const CudaOptions& options, Gpu gpu, std::unique_ptr<CublasLt> cublas)
    : compute_(options.compute),
      fp8_(options.fp8 && options.compute == DType::bf16),
      gpu_(std::move(gpu)),
      planning_(options.planning),
      hopper_(options.hopper),
      older_(options.older),
      dry_(options.planning),
      cublas_(std::move(cublas)) {
  if (planning_) {
    weights_ = Pool::planning();
    working_ = Pool::planning();
    workspace_ = weights_->take(Gemms::kWorkspaceBytes);
    return;
  }
  select_device();
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream");
  weights_ = Pool::on_device(0, kWeightStep);
  working_ = Pool::on_device(0, kWorkingStep);
  workspace_ = weights_->take(Gemms::kWorkspaceBytes);
  gemms_ = std::make_unique<Gemms>(*cublas_, stream_, options.choices,
                                   fmt::format("{}, {} multiprocessors", gpu_.name, gpu_.multiprocessors));
}

CudaBackend::~CudaBackend() {
  if (stream_ == nullptr) return;
  (void)cudaStreamSynchronize(stream_);
  gemms_.reset();
  cudnn_.reset();
  (void)cudaStreamDestroy(stream_);
}

void CudaBackend::select_device() const { check(cudaSetDevice(gpu_.index), "choosing the device"); }

std::string CudaBackend::describe() const {
  return fmt::format("cuda:{}, {}, {}, {}", gpu_.index, gpu_.name,
                     compute_ == DType::f32 ? "f32"
                     : fp8_                 ? "bf16 with fp8 weights"
                                            : "bf16",
                     cudnn_ ? "cuBLASLt and cuDNN" : "cuBLASLt");
}

ProgramPtr CudaBackend::program(std::function<void()> body) {
  return std::make_unique<CudaProgram>(*this, std::move(body));
}

MarkPtr CudaBackend::mark() { return std::make_unique<CudaMark>(stream_); }

/// The pool of a run of `bodies` that computes nothing.
std::shared_ptr<Pool> CudaBackend::planned(const std::function<void()>& bodies) {
  const bool was_dry = dry_;
  const std::shared_ptr<Pool> before = working_;
  working_ = Pool::planning();
  std::shared_ptr<Pool> plan = working_;
  dry_ = true;
  try {
    bodies();
  } catch (...) {
    dry_ = was_dry;
    working_ = before;
    throw;
  }
  dry_ = was_dry;
  working_ = before;
  return plan;
}

void CudaBackend::reserve(const std::function<void()>& bodies) {
  if (!planning_) uploader_.finish();
  const std::shared_ptr<Pool> plan = planned(bodies);
  planned_working_ = static_cast<std::int64_t>(plan->peak());
  if (planning_) return;
  // A pool of its own for what comes now: what its programs use as scratch must not be handed to anybody else. The one
  // before lives on while tensors or programs of it do.
  const std::size_t wanted = std::max(plan->peak(), gemms_->scratch_wanted());
  working_.reset();
  working_ = Pool::on_device(wanted, kWorkingStep);
  if (gemms_->scratch_wanted() > 0) {
    const std::shared_ptr<void> scratch = working_->take(gemms_->scratch_wanted());
    gemms_->tune(scratch.get(), gemms_->scratch_wanted(), workspace());
  }
  check(cudaStreamSynchronize(stream_), "making room");
}

std::int64_t CudaBackend::working_bytes(const std::function<void()>& body) {
  int current = 0;
  check(cudaGetDevice(&current), "asking for the device");
  select_device();
  const std::shared_ptr<Pool> plan = planned(body);
  if (!planning_) {  // what it kept on the device is there for every stream
    const Relaxed relaxed;
    check(cudaStreamSynchronize(stream_), "planning a call");
  }
  check(cudaSetDevice(current), "choosing the device");
  return static_cast<std::int64_t>(plan->peak());
}

void CudaBackend::run_on(void* stream, void* memory, std::int64_t bytes, const std::function<void()>& body) {
  int current = 0;
  check(cudaGetDevice(&current), "asking for the device");
  if (current != gpu_.index) select_device();
  const cudaStream_t own = stream_;
  const std::shared_ptr<Pool> before = working_;
  const auto use = [this](cudaStream_t on) {
    stream_ = on;
    if (cudnn_) cudnn_->use(on);
  };
  const auto restore = [&] {
    use(own);
    working_ = before;
    if (current != gpu_.index) (void)cudaSetDevice(current);
  };
  try {
    use(static_cast<cudaStream_t>(stream));
    working_ = Pool::over(memory, static_cast<std::size_t>(bytes));
    body();
  } catch (...) {
    restore();
    throw;
  }
  restore();
}

MemoryUse CudaBackend::memory_use() const {
  std::size_t available = 0, total = 0;
  check(cudaMemGetInfo(&available, &total), "asking for the memory");
  return {.weights = static_cast<std::int64_t>(weights_->peak()),
          .working = planned_working_,
          .device_free = gpu_.free_bytes,
          .device_total = gpu_.total_bytes,
          .device_taken = gpu_.free_bytes - static_cast<std::int64_t>(available)};
}

std::vector<ProductTime> CudaBackend::product_times() const {
  return gemms_ ? gemms_->times() : std::vector<ProductTime>();
}

}  // namespace cuda

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options, std::string& why) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    (void)cudaGetLastError();
    why = status == cudaErrorInsufficientDriver ? "the NVIDIA driver is missing or older than this program's CUDA"
                                                : "there is no NVIDIA GPU here";
    return nullptr;
  }
  if (options.device >= count) {
    why = fmt::format("there {} {} GPU{}: cuda:0{}", count == 1 ? "is" : "are", count, count == 1 ? "" : "s",
                      count == 1 ? "" : fmt::format(" to cuda:{}", count - 1));
    return nullptr;
  }
  cudaDeviceProp properties{};
  cuda::check(cudaGetDeviceProperties(&properties, options.device), "asking for the GPU");
  if (properties.major < 8) {
    why = fmt::format("{} has compute capability {}.{}; 8.0 or newer is needed", properties.name, properties.major,
                      properties.minor);
    return nullptr;
  }
  if (options.fp8 && properties.major != 9) {
    why = fmt::format("{} has compute capability {}.{}, and 8-bit floats need 9.0 (Hopper)", properties.name,
                      properties.major, properties.minor);
    return nullptr;
  }
  std::unique_ptr<cuda::CublasLt> cublas;
  if (!options.planning || options.fp8) {
    cublas = cuda::CublasLt::load(why);
    if (!cublas) return nullptr;
    if (options.fp8 && !(why = cuda::Gemms::why_no_e4m3(*cublas)).empty()) return nullptr;
  }
  cuda::check(cudaSetDevice(options.device), "choosing the device");
  std::size_t available = 0, total = 0;
  cuda::check(cudaMemGetInfo(&available, &total), "asking for the memory");
  return std::make_unique<cuda::CudaBackend>(options,
                                             cuda::Gpu{.index = options.device,
                                                       .name = properties.name,
                                                       .major = properties.major,
                                                       .minor = properties.minor,
                                                       .multiprocessors = properties.multiProcessorCount,
                                                       .free_bytes = static_cast<std::int64_t>(available),
                                                       .total_bytes = static_cast<std::int64_t>(total)},
                                             std::move(cublas));
}

}  // namespace sparvar
