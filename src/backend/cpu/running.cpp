// Programs and marks of a device that computes at once.
#include <chrono>

#include "backend/cpu/cpu_backend.h"

namespace sparvar {
namespace {

class CpuProgram final : public Program {
 public:
  explicit CpuProgram(std::function<void()> body) : body_(std::move(body)) {}
  void run() override { body_(); }

 private:
  std::function<void()> body_;
};

class CpuMark final : public Mark {
 public:
  double seconds_since(const Mark& earlier) const override {
    return std::chrono::duration<double>(at_ - dynamic_cast<const CpuMark&>(earlier).at_).count();
  }

 private:
  std::chrono::steady_clock::time_point at_ = std::chrono::steady_clock::now();
};

}  // namespace

ProgramPtr CpuBackend::program(std::function<void()> body) { return std::make_unique<CpuProgram>(std::move(body)); }

MarkPtr CpuBackend::mark() { return std::make_unique<CpuMark>(); }

}  // namespace sparvar
