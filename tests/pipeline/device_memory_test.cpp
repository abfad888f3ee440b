// What is said where a model does not fit a GPU.
#include <gtest/gtest.h>

#include "pipeline/device.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr std::int64_t kGiB = 1LL << 30;

std::string refusal(const MemoryUse& use, Precision precision, int batch) {
  try {
    require_device_memory("some model", use, precision, batch);
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::system);
    return error.what();
  }
  return {};
}

MemoryUse use_of(std::int64_t weights, std::int64_t working, std::int64_t available) {
  return {.weights = weights * kGiB,
          .working = working * kGiB,
          .device_free = available * kGiB,
          .device_total = 80 * kGiB,
          .device_taken = 0};
}

TEST(DeviceMemory, WhatFitsIsTaken) {
  EXPECT_EQ(refusal(use_of(16, 8, 25), Precision::bf16, 1), "");
  EXPECT_EQ(refusal({}, Precision::f32, 8), "") << "a CPU plans none";
}

TEST(DeviceMemory, TheAdviceFits) {
  EXPECT_NE(refusal(use_of(16, 8, 24), Precision::bf16, 8).find("--batch 4 would fit"), std::string::npos);
  EXPECT_NE(refusal(use_of(16, 64, 25), Precision::bf16, 8).find("--batch 1 would fit"), std::string::npos);
  EXPECT_NE(refusal(use_of(16, 8, 20), Precision::f32, 1).find("--dtype bf16 --batch 1 would fit"), std::string::npos);
  EXPECT_NE(refusal(use_of(16, 8, 4), Precision::f32, 4).find("--device cpu"), std::string::npos);
  EXPECT_NE(refusal(use_of(16, 8, 20), Precision::bf16, 1).find("some model: needs 24.2 GiB"), std::string::npos);
}

}  // namespace
}  // namespace sparvar
