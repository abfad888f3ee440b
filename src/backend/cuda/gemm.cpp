#include "backend/cuda/gemm.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#include "backend/cuda/check.h"
#include "backend/cuda/kernels/kernels.h"

// The first that multiplies e4m3 numbers with a factor for every row of either side.
#define SPARVAR_CUBLAS_OF_E4M3 120900

namespace sparvar::cuda {
namespace {

constexpr int kCandidates = 24;
constexpr std::size_t kWeightsToRotate = 8;  // so that the second-level cache does not hold the weights that are timed
constexpr double kWorthMeasuring = 1e9;      // multiply-adds times two, or
constexpr std::int64_t kLargeWeight = 4 << 20;  // elements: small ones are over before a better choice matters

void check_blas(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw Error(ErrorKind::system, fmt::format("cuBLASLt: {}: status {}", what, static_cast<int>(status)));
}

bool own_takes(const GemmShape& shape) {
  return shape.is_plain() && supports_few_rows(shape.type, shape.rows, shape.in, shape.out);
}

FewRows own_product(const GemmShape& shape, const Operand& x, const Operand& weight, const void* bias, void* y,
                    bool settled) {
  return {.type = shape.type,
          .x = x.values,
          .w = weight.values,
          .x_scales = x.scales,
          .w_scales = weight.scales,
          .bias = shape.bias ? bias : nullptr,
          .y = y,
          .y_type = shape.result,
          .rows = static_cast<int>(shape.rows),
          .in = static_cast<int>(shape.in),
          .out = static_cast<int>(shape.out),
          .gelu = shape.gelu,
          .settled = settled};
}

bool worth_measuring(const GemmShape& shape) {
  const double work = 2.0 * static_cast<double>(shape.y_size()) * static_cast<double>(shape.in);
  return shape.type != DType::f32 && (work >= kWorthMeasuring || shape.in * shape.out >= kLargeWeight);
}

cudaDataType_t type_of(DType type) {
  if (type == DType::e4m3) return CUDA_R_8F_E4M3;
  return type == DType::f32 ? CUDA_R_32F : CUDA_R_16BF;
}

/// A product in a file of choices.
std::string product_name(const GemmShape& shape) {
  std::string one = fmt::format("{} x {} -> {}, {} to {}{}{}", shape.rows, shape.in, shape.out, name_of(shape.type),
                                name_of(shape.result), shape.bias ? ", bias" : "", shape.gelu ? ", GELU" : "");
  if (shape.is_plain()) return one;
  return fmt::format("{}, {} of W{} {} by {}", one, shape.batch, shape.turned ? " turned" : "", shape.w_row,
                     shape.w_batch);
}

cublasLtEpilogue_t epilogue_of(const GemmShape& shape) {
  if (shape.gelu) return shape.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
  return shape.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
}

}  // namespace

std::string Gemms::why_no_e4m3(const CublasLt& library) {
  const auto text = [](std::size_t version) {
    return fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
  };
  constexpr std::size_t needed = SPARVAR_CUBLAS_OF_E4M3;
  if (CUBLAS_VERSION < needed)
    return fmt::format("8-bit floats need a build with cuBLASLt {} or newer; this one is of {}", text(needed),
                       text(CUBLAS_VERSION));
  const std::size_t found = library.cublasLtGetVersion();
  return found >= needed
             ? std::string()
             : fmt::format("8-bit floats need cuBLASLt {} or newer; {} is installed", text(needed), text(found));
}

struct Gemms::Problem {
  explicit Problem(const CublasLt& library) : lt(library) {}
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;
  ~Problem() { forget(); }
  void forget() {
    if (target != nullptr) lt.cublasLtMatrixLayoutDestroy(target);
    if (input != nullptr) lt.cublasLtMatrixLayoutDestroy(input);
    if (weight != nullptr) lt.cublasLtMatrixLayoutDestroy(weight);
    if (operation != nullptr) lt.cublasLtMatmulDescDestroy(operation);
    operation = nullptr;
    weight = input = target = nullptr;
  }
  const CublasLt& lt;
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t weight = nullptr, input = nullptr, target = nullptr;
  std::vector<cublasLtMatmulHeuristicResult_t> candidates;  // the library's favourite first
  std::size_t chosen = 0;
  bool own = false;           // kernels/few_rows.cu
  bool scaled_after = false;  // of e4m3: scales, bias and GELU are left to scale_product
  bool measured = false;
  double seconds = 0;  // of the chosen one
  std::vector<Operand> weights;
};

Gemms::Gemms(const CublasLt& library, cudaStream_t stream, std::shared_ptr<ProductChoices> choices,
             const std::string& machine)
    : library_(library),
      stream_(stream),
      choices_(std::move(choices)),
      machine_(fmt::format("{}, cuBLASLt {}", machine, library.cublasLtGetVersion())) {
  check_blas(library.cublasLtCreate(&handle_), "starting");
}

Gemms::~Gemms() {
  problems_.clear();
  if (handle_ != nullptr) library_.cublasLtDestroy(handle_);
}

/// cuBLASLt counts columns first: its W is [in, out] transposed, its x [in, rows], its y [out, rows].
Gemms::Problem& Gemms::problem(const GemmShape& shape) {
  std::unique_ptr<Problem>& known = problems_[shape];
  if (known) return *known;
  auto made = std::make_unique<Problem>(library_);
  made->own = own_takes(shape);
  if (!made->own) {
    describe(shape, *made);
    find_candidates(shape, *made);
    if (made->candidates.empty() && shape.type == DType::e4m3) {  // seen of 72 and 128 rows and a depth of 14336
      made->forget();
      made->scaled_after = true;
      describe(shape, *made);
      find_candidates(shape, *made);
    }
  }
  known = std::move(made);
  return *known;
}

void Gemms::describe(const GemmShape& shape, Problem& made) {
  const CublasLt& lt = library_;
  check_blas(lt.cublasLtMatmulDescCreate(&made.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a product");
  const cublasOperation_t transposed = shape.turned ? CUBLAS_OP_N : CUBLAS_OP_T;
  const cublasLtEpilogue_t epilogue = made.scaled_after ? CUBLASLT_EPILOGUE_DEFAULT : epilogue_of(shape);
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
    check_blas(lt.cublasLtMatmulDescSetAttribute(made.operation, attribute, &value, sizeof value), "an attribute");
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, transposed);
  set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
  if (shape.type == DType::e4m3) {
    const std::int8_t fast = 1;  // sums of about 14 bits: the numbers have 4
    set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, fast);
  }
#if CUBLAS_VERSION >= SPARVAR_CUBLAS_OF_E4M3
  if (shape.type == DType::e4m3 && !made.scaled_after) {
    const std::int32_t factor_a_row = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    const void* somewhere = reinterpret_cast<const void*>(std::uintptr_t{4096});  // NOLINT: that there is one is asked
    set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, factor_a_row);
    set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, factor_a_row);
    set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, somewhere);
    set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, somewhere);
  }
#endif
  const std::int64_t of_row = shape.turned ? shape.out : shape.in, rows = shape.turned ? shape.in : shape.out;
  const std::int64_t w_row = shape.w_row > 0 ? shape.w_row : of_row;
  check_blas(lt.cublasLtMatrixLayoutCreate(&made.weight, type_of(shape.type), of_row, rows, w_row), "W");
  check_blas(lt.cublasLtMatrixLayoutCreate(&made.input, type_of(shape.type), shape.in, shape.rows, shape.in), "x");
  check_blas(lt.cublasLtMatrixLayoutCreate(&made.target, type_of(shape.result), shape.out, shape.rows, shape.out), "y");
  if (shape.batch == 1) return;
  const auto repeat = [&](cublasLtMatrixLayout_t layout, std::int64_t apart) {
    const auto count = static_cast<std::int32_t>(shape.batch);
    check_blas(lt.cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count),
               "a batch");
    check_blas(
        lt.cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &apart, sizeof apart),
        "a batch");
  };
  repeat(made.weight, shape.w_batch > 0 ? shape.w_batch : w_row * rows);
  repeat(made.input, shape.rows * shape.in);
  repeat(made.target, shape.rows * shape.out);
}

void Gemms::find_candidates(const GemmShape& shape, Problem& made) {
  const CublasLt& lt = library_;
  cublasLtMatmulPreference_t preference = nullptr;
  check_blas(lt.cublasLtMatmulPreferenceCreate(&preference), "preferences");
  const std::size_t workspace = kWorkspaceBytes;
  (void)lt.cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                                sizeof workspace);
  made.candidates.resize(worth_measuring(shape) ? kCandidates : 1);
  int found = 0;
  (void)lt.cublasLtMatmulAlgoGetHeuristic(handle_, made.operation, made.weight, made.input, made.target, made.target,
                                          preference, static_cast<int>(made.candidates.size()), made.candidates.data(),
                                          &found);
  lt.cublasLtMatmulPreferenceDestroy(preference);
  made.candidates.resize(found);
  std::erase_if(made.candidates, [](const auto& result) { return result.state != CUBLAS_STATUS_SUCCESS; });
}

bool Gemms::supports(const GemmShape& shape) {
  const Problem& p = problem(shape);
  return p.own || !p.candidates.empty();
}

void Gemms::prepare(const GemmShape& shape, const Operand& weight) {
  Problem& p = problem(shape);
  if (worth_measuring(shape) && !p.measured && p.candidates.size() > 1 && p.weights.size() < kWeightsToRotate &&
      std::find(p.weights.begin(), p.weights.end(), weight) == p.weights.end())
    p.weights.push_back(weight);
}

namespace {

std::size_t aligned(std::size_t bytes) { return (bytes + 1023) / 1024 * 1024; }

/// Memory of a measurement: inputs (of e4m3 with their scales, and the numbers they are made from), the result of the
/// library's favourite, that of another.
struct Trial {
  std::size_t x, scales, source, bias, y, counter = 1024;
  explicit Trial(const GemmShape& shape)
      : x(aligned(shape.x_size() * size_of(shape.type))),
        scales(shape.type == DType::e4m3 ? aligned(shape.rows * 4) : 0),
        source(shape.type == DType::e4m3 ? aligned(shape.x_size() * size_of(DType::bf16)) : 0),
        bias(aligned(shape.out * 4)),
        y(aligned(shape.y_size() * size_of(shape.result))) {}
  std::size_t bytes() const { return x + scales + source + bias + 2 * y + counter; }
};

/// Random x at the beginning of `memory`.
Operand random_input(const GemmShape& shape, const Trial& trial, char* memory, cudaStream_t stream) {
  const std::int64_t count = shape.x_size();
  if (shape.type != DType::e4m3) {
    fill_random(memory, shape.type, count, 1, 1.0F, stream);
    return {memory, nullptr};
  }
  auto* const scales = reinterpret_cast<float*>(memory + trial.x);
  char* const source = memory + trial.x + trial.scales;
  fill_random(source, DType::bf16, count, 1, 1.0F, stream);
  quantise_rows({.x = source,
                 .type = DType::bf16,
                 .rows = shape.rows,
                 .width = static_cast<int>(shape.in),
                 .out = memory,
                 .scales = scales},
                stream);
  return {memory, scales};
}

}  // namespace

std::size_t Gemms::scratch_wanted() const {
  std::size_t most = 0;
  for (const auto& [shape, p] : problems_)
    if (!p->weights.empty() && !p->measured) most = std::max(most, Trial(shape).bytes());
  return most;
}

std::vector<ProductTime> Gemms::times() const {
  std::vector<ProductTime> out;
  for (const auto& [shape, p] : problems_)
    if (p->measured) out.push_back({shape.rows, shape.in, shape.out, p->seconds});
  return out;
}

bool Gemms::launch(const Problem& p, int candidate, const Operand& x, const Operand& weight, void* y, void* workspace) {
  const float one = 1.0F;
  const float zero = 0.0F;
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const float* scales) {
    check_blas(library_.cublasLtMatmulDescSetAttribute(p.operation, attribute, &scales, sizeof scales), "a scale");
  };
  if (x.scales != nullptr && !p.scaled_after) {
    set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, weight.scales);
    set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, x.scales);
  }
  return library_.cublasLtMatmul(handle_, p.operation, &one, weight.values, p.weight, x.values, p.input, &zero, y,
                                 p.target, y, p.target, &p.candidates[candidate].algo, workspace, kWorkspaceBytes,
                                 stream_) == CUBLAS_STATUS_SUCCESS;
}

/// Takes the algorithm of a choice, if the library still offers it.
bool Gemms::follow(Problem& p, const ProductChoices::Choice& choice) const {
  static_assert(sizeof(choice.algorithm) == sizeof(cublasLtMatmulAlgo_t));
  for (std::size_t i = 0; i < p.candidates.size(); ++i)
    if (std::memcmp(&p.candidates[i].algo, choice.algorithm.data(), sizeof choice.algorithm) == 0) {
      p.chosen = i;
      p.seconds = choice.seconds;
      return true;
    }
  return false;
}

/// The fastest of the candidates. Which one it is depends on the hour, and pictures must not: where choices are not
/// kept for other processes, candidates must give the same bits as the library's favourite.
void Gemms::measure(const GemmShape& shape, Problem& p, char* scratch, void* workspace) {
  const Trial trial(shape);
  const Operand x = random_input(shape, trial, scratch, stream_);
  char* const bias = scratch + trial.x + trial.scales + trial.source;
  char* const expected = bias + trial.bias;
  char* const y = expected + trial.y;
  auto* const differing = reinterpret_cast<unsigned*>(y + trial.y);
  fill_random(bias, shape.result, shape.out, 2, 1.0F, stream_);
  const void* bias_address = bias;
  if (shape.bias && !p.scaled_after)
    check_blas(library_.cublasLtMatmulDescSetAttribute(p.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias_address,
                                                       sizeof bias_address),
               "the bias");
  const auto same_bits = [&](int candidate) {
    if (!launch(p, candidate, x, p.weights.front(), y, workspace)) return false;
    unsigned count = 0;
    count_differing(expected, y, shape.y_size() * static_cast<std::int64_t>(size_of(shape.result)), differing, stream_);
    check(cudaMemcpyAsync(&count, differing, sizeof count, cudaMemcpyDeviceToHost, stream_), "comparing products");
    check(cudaStreamSynchronize(stream_), "comparing products");
    return count == 0;
  };
  cudaEvent_t start = nullptr, stop = nullptr;
  check(cudaEventCreate(&start), "an event");
  check(cudaEventCreate(&stop), "an event");
  std::size_t turn = 0;
  const auto milliseconds = [&](int candidate, int runs) {
    const auto next = [&] { return p.weights[turn++ % p.weights.size()]; };
    if (!launch(p, candidate, x, next(), y, workspace)) return std::numeric_limits<float>::infinity();
    check(cudaEventRecord(start, stream_), "timing");
    for (int i = 0; i < runs; ++i) (void)launch(p, candidate, x, next(), y, workspace);
    check(cudaEventRecord(stop, stream_), "timing");
    check(cudaEventSynchronize(stop), "measuring a product");
    float elapsed = 0;
    check(cudaEventElapsedTime(&elapsed, start, stop), "timing");
    return elapsed / static_cast<float>(runs);
  };
  (void)launch(p, 0, x, p.weights.front(), expected, workspace);
  const int count = static_cast<int>(p.candidates.size());
  std::vector<float> quick(count, std::numeric_limits<float>::infinity());
  for (int i = 0; i < count; ++i)
    if (i == 0 || choices_ || same_bits(i)) quick[i] = std::min(milliseconds(i, 2), milliseconds(i, 3));
  const float bound = 1.1F * *std::min_element(quick.begin(), quick.end());
  float best = std::numeric_limits<float>::infinity();
  for (int i = 0; i < count; ++i) {
    if (!(quick[i] <= bound)) continue;
    const float time = milliseconds(i, 8);
    if (time < best) {
      best = time;
      p.chosen = static_cast<std::size_t>(i);
      p.seconds = time * 1e-3;
    }
  }
  (void)cudaEventDestroy(start);
  (void)cudaEventDestroy(stop);
}

void Gemms::tune(void* scratch, std::size_t scratch_bytes, void* workspace) {
  if (scratch_wanted() > scratch_bytes) return;
  for (const auto& [shape, p] : problems_) {
    if (p->weights.empty() || p->measured) continue;
    const std::string product = product_name(shape);
    const std::optional<ProductChoices::Choice> known = choices_ ? choices_->find(machine_, product) : std::nullopt;
    if (!known || !follow(*p, *known)) {
      measure(shape, *p, static_cast<char*>(scratch), workspace);
      if (choices_) {
        ProductChoices::Choice own{.algorithm = {}, .seconds = p->seconds};
        std::memcpy(own.algorithm.data(), &p->candidates[p->chosen].algo, sizeof own.algorithm);
        (void)follow(*p, choices_->keep(machine_, product, own));
      }
    }
    p->measured = true;
    p->weights.clear();
  }
}

void Gemms::run(const GemmShape& shape, const Operand& x, const Operand& weight, const void* bias, void* y,
                void* workspace, bool settled) {
  Problem& p = problem(shape);
  if (p.own) return few_rows(own_product(shape, x, weight, bias, y, settled), stream_);
  if (p.candidates.empty())
    throw Error(ErrorKind::system, fmt::format("cuBLASLt has no product of [{}, {}] and [{}, {}]^T in {}", shape.rows,
                                               shape.in, shape.out, shape.in, name_of(shape.type)));
  if (shape.bias && !p.scaled_after)
    check_blas(
        library_.cublasLtMatmulDescSetAttribute(p.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias),
        "the bias");
  if (!launch(p, static_cast<int>(p.chosen), x, weight, y, workspace))
    throw Error(ErrorKind::system, fmt::format("cuBLASLt refused a product of [{}, {}] and [{}, {}]^T", shape.rows,
                                               shape.in, shape.out, shape.in));
  if (p.scaled_after)
    scale_product({.y = y,
                   .rows = shape.rows,
                   .out = static_cast<int>(shape.out),
                   .x_scales = x.scales,
                   .w_scales = weight.scales,
                   .bias = shape.bias ? bias : nullptr,
                   .gelu = shape.gelu},
                  stream_);
}

}  // namespace sparvar::cuda
