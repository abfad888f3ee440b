// The bytes of an .npz, field by field; tests/cli/commands_test.py has NumPy read one where there is NumPy.
#include "weights/npz.h"

#include <gtest/gtest.h>

#include <cstring>

#include "sparvar/error.h"

namespace sparvar {
namespace {

std::uint32_t number(const std::vector<std::uint8_t>& bytes, std::size_t at, int size) {
  std::uint32_t value = 0;
  for (int i = 0; i < size; ++i) value |= static_cast<std::uint32_t>(bytes[at + static_cast<std::size_t>(i)]) << 8 * i;
  return value;
}

std::string text(const std::vector<std::uint8_t>& bytes, std::size_t at, std::size_t size) {
  return {bytes.begin() + static_cast<std::ptrdiff_t>(at), bytes.begin() + static_cast<std::ptrdiff_t>(at + size)};
}

TEST(Npz, HoldsArraysAsNumpyWritesThem) {
  Tensor small = Tensor::empty(DType::u8, {2, 3});
  for (int i = 0; i < 6; ++i) small.data<std::uint8_t>()[i] = static_cast<std::uint8_t>(i);
  const std::vector<std::uint8_t> zip = npz_bytes({{"ab", small}, {"c", Tensor::from({1.5F}, {1})}});
  EXPECT_EQ(number(zip, 0, 4), 0x04034B50U);
  EXPECT_EQ(number(zip, 8, 2), 0U);  // stored
  EXPECT_EQ(number(zip, 18, 4), 128U + 6U);
  EXPECT_EQ(number(zip, 22, 4), 128U + 6U);
  EXPECT_EQ(text(zip, 30, 6), "ab.npy");
  EXPECT_EQ(text(zip, 36, 6), "\x93NUMPY");
  EXPECT_EQ(number(zip, 42, 2), 1U);
  EXPECT_EQ(number(zip, 44, 2), 118U);  // to a multiple of 64
  const std::string header = text(zip, 46, 118);
  EXPECT_TRUE(header.starts_with("{'descr': '|u1', 'fortran_order': False, 'shape': (2,3,), }")) << header;
  EXPECT_EQ(header.back(), '\n');
  EXPECT_EQ(std::memcmp(zip.data() + 36 + 128, small.raw(), 6), 0);
  // The end says where the directory is, and the directory where the files are.
  const std::size_t end = zip.size() - 22;
  EXPECT_EQ(number(zip, end, 4), 0x06054B50U);
  EXPECT_EQ(number(zip, end + 10, 2), 2U);
  const std::size_t directory = number(zip, end + 16, 4);
  EXPECT_EQ(directory + number(zip, end + 12, 4), end);
  EXPECT_EQ(number(zip, directory, 4), 0x02014B50U);
  EXPECT_EQ(number(zip, directory + 42, 4), 0U);
  const std::size_t second = directory + 46 + 6;
  EXPECT_EQ(text(zip, second + 46, 5), "c.npy");
  EXPECT_EQ(number(zip, number(zip, second + 42, 4), 4), 0x04034B50U);
  EXPECT_EQ(number(zip, directory + 16, 4), number(zip, 14, 4));  // the checksum, twice
}

TEST(Npz, RefusesWhatNumpyHasNotAndTakesNothing) {
  EXPECT_THROW(npz_bytes({{"x", Tensor::zeros(DType::bf16, {2})}}), Error);
  EXPECT_EQ(npz_bytes({}).size(), 22U);
}

}  // namespace
}  // namespace sparvar
