// The one oneDNN engine of the process, how primitives run, and conversions the CPU operations share.
#pragma once

#include <dnnl.hpp>
#include <unordered_map>

#include "core/tensor.h"

namespace sparvar {

dnnl::engine& dnnl_engine();
/// Runs a primitive and waits for it. The only way to run one: signals must wait meanwhile (core/held_signals.h).
void execute(const dnnl::primitive& primitive, const std::unordered_map<int, dnnl::memory>& args);
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
