// A signal may come at any moment of a product: its handler must find a stack, on a thread that is not OpenMP's.
#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/time.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <random>

#include "backend/backend.h"
#include "backend/device_under_test.h"
#include "core/parallel.h"
#include "support.h"

namespace sparvar {
namespace {

std::atomic<std::uintptr_t> stack_begin{0}, stack_end{0};
std::atomic<int> handled{0}, misplaced{0};

void on_alarm(int) {
  const auto here = reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0));
  ++handled;
  if (here < stack_begin.load() || here >= stack_end.load()) ++misplaced;
}

void remember_stack() {
  pthread_attr_t attributes;
  ASSERT_EQ(pthread_getattr_np(pthread_self(), &attributes), 0);
  void* begin = nullptr;
  std::size_t size = 0;
  pthread_attr_getstack(&attributes, &begin, &size);
  pthread_attr_destroy(&attributes);
  stack_begin = reinterpret_cast<std::uintptr_t>(begin);
  stack_end = stack_begin + size;
}

/// oneDNN's f32 products where it knows no AVX-512 (ctest runs this with ONEDNN_MAX_CPU_ISA=AVX2 as well).
TEST(Signals, FindTheStackOfTheThreadThatComputes) {
  if (testing::on_gpu()) GTEST_SKIP() << "of the CPU's products; a GPU's driver has threads that take signals too";
  remember_stack();
  const std::unique_ptr<Backend> backend = make_cpu_backend({.compute = DType::f32, .threads = 2});
  const unsigned seed = std::random_device{}();
  const LinearPtr weights = backend->prepare_linear(testing::random_tensor({640, 1024}, seed), {});
  const Tensor x = testing::random_tensor({96, 1024}, seed + 1);
  const Tensor want = backend->linear(x, *weights, Activation::none, DType::f32);

  struct sigaction action {
  }, action_before{};
  action.sa_handler = on_alarm;
  action.sa_flags = SA_RESTART;
  ASSERT_EQ(sigaction(SIGALRM, &action, &action_before), 0);
  const itimerval often{{0, 100}, {0, 100}}, never{};
  setitimer(ITIMER_REAL, &often, nullptr);
  const auto start = std::chrono::steady_clock::now();
  while (std::chrono::steady_clock::now() - start < std::chrono::milliseconds(300)) {
    EXPECT_EQ(testing::max_difference(backend->linear(x, *weights, Activation::none, DType::f32), want), 0);
    parallel_for(8, [](std::int64_t) {});
  }
  setitimer(ITIMER_REAL, &never, nullptr);
  sigaction(SIGALRM, &action_before, nullptr);
  EXPECT_GT(handled, 0);
  EXPECT_EQ(misplaced, 0);
}

}  // namespace
}  // namespace sparvar
