// A second device for PyTorch without hardware: memory of the host under the name of the PrivateUse1 backend, with the
// kernels of the CPU. As on a GPU, a tensor of it that meets one of the CPU is an error, recurrent cells are one operation,
// and what is held in its memory can be asked. What only CUDA has (cuDNN, graphs, streams) is not here. See emulated.py.
#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

namespace {

int64_t held = 0;

struct Sized { void* data; size_t size; };

void release(void* context) {
  auto* one = static_cast<Sized*>(context);
  held -= static_cast<int64_t>(one->size);
  c10::free_cpu(one->data);
  delete one;
}

struct HostAllocator final : at::Allocator {
  at::DataPtr allocate(size_t size) override {
    void* data = size ? c10::alloc_cpu(size) : nullptr;
    held += static_cast<int64_t>(size);
    return {data, new Sized{data, size}, &release, at::Device(at::DeviceType::PrivateUse1, 0)};
  }
  void copy_data(void* to, const void* from, std::size_t size) const override { std::memcpy(to, from, size); }
};
HostAllocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator);

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &allocator, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &allocator, keys, c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the CPU, which lives as long as the original does.
at::Tensor on_host(const at::Tensor& x) {
  if (x.is_cpu()) return x;
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), x.options().device(at::kCPU).requires_grad(false));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  on_host(to).copy_(on_host(self));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (to.sizes() != self.sizes()) to.resize_(self.sizes());
  on_host(to).copy_(on_host(self));
  return to;
}

void check(const c10::OperatorHandle& op, const at::Tensor& x) {
  TORCH_CHECK(!x.defined() || !x.is_cpu() || x.dim() == 0, "Expected all tensors to be on the same device, but ",
              op.schema().name(), " was given one of the CPU, of shape ", x.sizes(), ", beside those of another device");
}

// As on a GPU: a number may come from the CPU, and the positions that indexing takes; nothing else.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  if (name.find("index_put") == std::string::npos && name != "aten::index") {
    for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
      if (value.isTensor()) check(op, value.toTensor());
      if (value.isTensorList()) for (const at::Tensor& x : value.toTensorList()) check(op, x);
    }
  }
  at::native::cpu_fallback(op, stack);
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b, c10::IntArrayRef stride,
                       c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef out,
                       int64_t groups) {
  auto bias = b && b->defined() ? std::optional<at::Tensor>(on_host(*b)) : std::nullopt;
  return at::convolution(on_host(x), on_host(w), bias, stride, padding, dilation, transposed, out, groups).to(x.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& g, const at::Tensor& x, const at::Tensor& w, c10::IntArrayRef stride, c10::IntArrayRef padding,
    c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef out, int64_t groups, std::array<bool, 3> mask) {
  std::vector<int64_t> bias{transposed ? w.size(1) * groups : w.size(0)};
  auto [a, b, c] = at::convolution_backward(on_host(g), on_host(x), on_host(w), c10::IntArrayRef(bias), stride, padding,
                                            dilation, transposed, out, groups, mask);
  auto back = [&](const at::Tensor& t) { return t.defined() ? t.to(x.device()) : t; };
  return {back(a), back(b), back(c)};
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto* one = self.unsafeGetTensorImpl();
  one->set_sizes_contiguous(sizes);
  size_t needed = one->numel() * self.itemsize() + self.storage_offset() * self.itemsize();
  auto& storage = self.storage();
  if (storage.nbytes() < needed) {
    auto fresh = allocator.allocate(needed);
    if (storage.nbytes()) std::memcpy(fresh.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.set_nbytes(needed);
  }
  return self;
}

at::Tensor& set_source(at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* one = self.unsafeGetTensorImpl();
  one->set_storage_keep_dtype(std::move(source));
  one->set_storage_offset(offset);
  one->set_sizes_and_strides(size, stride);
  return self;
}

at::Tensor& set_whole(at::Tensor& self, at::Storage source) {
  int64_t count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_source(self, source, 0, {count}, {1});
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

using Maybe = std::optional<at::Tensor>;
at::Tensor with(const at::Tensor& x, const Maybe& bias) { return bias && bias->defined() ? x + *bias : x; }
at::Tensor or_zeros(const Maybe& x, const at::Tensor& like) { return x && x->defined() ? *x : at::zeros_like(like); }

// The fused cells of recurrent layers, which every device but the CPU is asked for, out of single steps.
std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& cell,
                                                    const Maybe& bias_a, const Maybe& bias_b) {
  auto gates = (with(a, bias_a) + with(b, bias_b)).chunk(4, 1);
  auto i = gates[0].sigmoid(), f = gates[1].sigmoid(), g = gates[2].tanh(), o = gates[3].sigmoid();
  auto next = f * cell + i * g;
  return {o * next.tanh(), next, at::cat({i, f, g, o}, 1)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_backward(const Maybe& grad_hidden, const Maybe& grad_cell,
                                                             const at::Tensor& cell, const at::Tensor& next,
                                                             const at::Tensor& kept, bool has_bias) {
  auto gates = kept.chunk(4, 1);
  auto i = gates[0], f = gates[1], g = gates[2], o = gates[3], t = next.tanh();
  auto by_hidden = or_zeros(grad_hidden, next);
  auto by_cell = or_zeros(grad_cell, next) + by_hidden * o * (1 - t * t);
  auto all = at::cat({by_cell * g * i * (1 - i), by_cell * cell * f * (1 - f), by_cell * i * (1 - g * g),
                      by_hidden * t * o * (1 - o)}, 1);
  return {all, by_cell * f, has_bias ? all.sum(0) : at::Tensor()};
}

std::tuple<at::Tensor, at::Tensor> gru(const at::Tensor& a, const at::Tensor& b, const at::Tensor& hidden,
                                       const Maybe& bias_a, const Maybe& bias_b) {
  auto x = with(a, bias_a).chunk(3, 1), y = with(b, bias_b).chunk(3, 1);
  auto r = (x[0] + y[0]).sigmoid(), z = (x[1] + y[1]).sigmoid(), n = (x[2] + r * y[2]).tanh();
  return {n + z * (hidden - n), at::cat({r, z, n, hidden, y[2]}, 1)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> gru_backward(const at::Tensor& grad,
                                                                                    const at::Tensor& kept, bool has_bias) {
  auto parts = kept.chunk(5, 1);
  auto r = parts[0], z = parts[1], n = parts[2], hidden = parts[3], y = parts[4];
  auto by_z = grad * (hidden - n) * z * (1 - z), by_n = grad * (1 - z) * (1 - n * n), by_r = by_n * y * r * (1 - r);
  auto first = at::cat({by_r, by_z, by_n}, 1), second = at::cat({by_r, by_z, by_n * r}, 1);
  auto none = at::Tensor();
  return {first, second, grad * z, has_bias ? first.sum(0) : none, has_bias ? second.sum(0) : none};
}

// In training it writes to the running statistics, which its schema does not say: so it must be given them themselves.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm(const at::Tensor& x, const Maybe& weight, const Maybe& bias,
                                                          const Maybe& mean, const Maybe& variance, bool training,
                                                          double momentum, double eps) {
  auto host = [](const Maybe& t) { return t && t->defined() ? Maybe(on_host(*t)) : Maybe(); };
  auto [y, a, b] = at::native_batch_norm(on_host(x), host(weight), host(bias), host(mean), host(variance), training,
                                         momentum, eps);
  return {y.to(x.device()), a.to(x.device()), b.to(x.device())};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("native_batch_norm", batch_norm);
  m.impl("_thnn_fused_lstm_cell", lstm);
  m.impl("_thnn_fused_lstm_cell_backward_impl", lstm_backward);
  m.impl("_thnn_fused_gru_cell", gru);
  m.impl("_thnn_fused_gru_cell_backward", gru_backward);
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_source);
  m.impl("set_.source_Storage", set_whole);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("_local_scalar_dense", [](const at::Tensor& x) { return at::_local_scalar_dense(on_host(x)); });
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

struct Hooks : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
};
const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

}  // namespace

namespace {
// One stream, on which everything is done at once.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::PrivateUse1;
  c10::Device here() const { return c10::Device(static_type, 0); }
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, here()); }
  c10::DeviceType type() const override { return static_type; }
  c10::Device exchangeDevice(c10::Device) const override { return here(); }
  c10::Device getDevice() const override { return here(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
}  // namespace

// Bytes of all tensors on the device now.
TORCH_LIBRARY(emulated, m) {
  m.def("held() -> int", [] { return held; });
}
