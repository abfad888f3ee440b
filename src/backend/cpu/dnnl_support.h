// The one oneDNN engine and stream of the process, and conversions the CPU operations share.
#pragma once

#include <dnnl.hpp>

#include "core/tensor.h"

namespace sparvar {

dnnl::engine& dnnl_engine();
dnnl::stream& dnnl_stream();
dnnl::memory::data_type dnnl_type(DType dtype);
/// oneDNN multiplies bf16 with AVX-512 only; elsewhere products of bf16 numbers are taken in f32.
bool multiplies_bf16();
/// oneDNN does not survive a kernel that it cannot get memory for: throws Error(system) first where little is left.
void require_memory_for_kernels();
/// A failure of oneDNN as one of ours.
[[noreturn]] void rethrow(const dnnl::error& failure);
/// f32 <-> bf16 copy on all threads.
Tensor convert(const Tensor& x, DType dtype);

}  // namespace sparvar
