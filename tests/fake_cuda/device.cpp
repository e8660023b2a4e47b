// Makes "cuda" a device of the CPU build of torch: memory of its own kind, values computed by the
// CPU's kernels. Tensors on it are CUDA tensors to autograd, autocast, dispatch and Python; mixing
// them with CPU tensors fails as on a GPU. `device.py` builds and loads this.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/TensorBody.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::IValue;
using c10::Stream;

const Device CUDA0(c10::DeviceType::CUDA, 0);

// Memory: the process's own, counted in the blocks of CUDA's allocator and limited if asked.

std::atomic<size_t> used{0}, peak{0}, limit{0};

size_t rounded(size_t bytes) { return (bytes + 511) / 512 * 512; }

void take(size_t bytes) {
  TORCH_CHECK_WITH(
      OutOfMemoryError,
      !limit || used + rounded(bytes) <= limit,
      "CUDA out of memory. Tried to allocate ", bytes, " bytes. GPU 0 has a total capacity of ",
      limit.load(), " bytes, of which ", limit - std::min(used.load(), limit.load()), " is free.");
  const size_t now = used += rounded(bytes);
  size_t before = peak;
  while (now > before && !peak.compare_exchange_weak(before, now)) {}
}

// A storage of a CPU kernel's result, kept alive by the CUDA storage that took it over.
struct Held {
  c10::Storage storage;
  size_t bytes;
};

void release(void* context) {
  auto* held = static_cast<Held*>(context);
  used -= rounded(held->bytes);
  delete held;
}

c10::DataPtr adopted(c10::Storage storage) {
  const size_t bytes = storage.nbytes();
  take(bytes);
  void* data = storage.mutable_data();
  return {data, new Held{std::move(storage), bytes}, &release, CUDA0};
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, c10::GetCPUAllocator(), true);
    return adopted(std::move(storage));
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

Allocator allocator;

// One device, one stream.

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Stream stream() { return Stream(Stream::UNSAFE, CUDA0, 0); }
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return CUDA0; }
  Device getDevice() const override { return CUDA0; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return stream(); }
  Stream exchangeStream(Stream before) const override { return before; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void deviceSynchronize(DeviceIndex) const override {}
  Device getDeviceFromPtr(void*) const override { return CUDA0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  at::Generator getNewGenerator(DeviceIndex) const override {
    return at::make_generator<at::CPUGeneratorImpl>();
  }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};

// Operators: each runs on CPU tensors that share the memory of the CUDA ones.

Tensor on_cpu(const Tensor& tensor) {
  auto* own = tensor.unsafeGetTensorImpl();
  const auto& storage = tensor.storage();
  c10::Storage shared(
      c10::Storage::use_byte_size_t(), storage.nbytes(),
      c10::DataPtr(const_cast<void*>(storage.data()), c10::DeviceType::CPU),
      c10::GetCPUAllocator(), true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(shared), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (own->is_wrapped_number()) impl->set_wrapped_number(true);
  if (tensor.is_conj()) impl->_set_conj(true);
  if (tensor.is_neg()) impl->_set_neg(true);
  return made;
}

Tensor on_cuda(const Tensor& tensor, const c10::Storage& storage) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), tensor.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) impl->_set_conj(true);
  if (tensor.is_neg()) impl->_set_neg(true);
  return made;
}

// The CPU twins of an operator's tensors, and the way back.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : op_(op) {}

  IValue in(const IValue& value) {
    if (value.isTensor()) return twin(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> made;
      for (const auto& one : value.toTensorVector()) made.push_back(twin(one));
      return made;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> made;
      for (const std::optional<Tensor>& one : value.toOptionalTensorList())
        made.push_back(one.has_value() ? std::optional<Tensor>(twin(*one)) : std::nullopt);
      return made;
    }
    if (value.isDevice()) return Device(c10::DeviceType::CPU);
    return value;
  }

  IValue out(const IValue& value) {
    if (value.isTensor()) return back(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> made;
      for (const auto& one : value.toTensorVector()) made.push_back(back(one));
      return made;
    }
    return value;
  }

  // On a GPU every tensor of more than a number lies there; index tensors may come from the CPU.
  void check_devices() const {
    const bool indexed = op_.schema().name().find("index") != std::string::npos;
    TORCH_CHECK(
        pairs_.empty() || !others_ || indexed,
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
        "cpu! (", op_.schema().name(), ")");
  }

  // What an operator resized lies somewhere else now.
  void follow_resized() {
    for (auto& [cuda, cpu] : pairs_) {
      if (cpu.storage().data() != cuda.storage().data()) {
        auto fresh = c10::Storage(
            c10::Storage::use_byte_size_t(), cpu.storage().nbytes(), adopted(cpu.storage()),
            &allocator, true);
        cuda.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(fresh));
      }
      if (cpu.sizes() != cuda.sizes() || cpu.strides() != cuda.strides())
        cuda.unsafeGetTensorImpl()->set_sizes_and_strides(
            cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }

 private:
  Tensor twin(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      others_ |= tensor.dim() > 0;
      return tensor;
    }
    pairs_.emplace_back(tensor, on_cpu(tensor));
    return pairs_.back().second;
  }

  Tensor back(const Tensor& tensor) const {
    if (!tensor.defined() || !tensor.is_cpu()) return tensor;
    for (const auto& [cuda, cpu] : pairs_)
      if (cpu.is_same(tensor)) return cuda;
    for (const auto& [cuda, cpu] : pairs_)
      if (tensor.storage().nbytes() && tensor.storage().data() == cuda.storage().data())
        return on_cuda(tensor, cuda.storage());
    return on_cuda(
        tensor,
        c10::Storage(
            c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), adopted(tensor.storage()),
            &allocator, true));
  }

  const c10::OperatorHandle& op_;
  std::vector<std::pair<Tensor, Tensor>> pairs_;  // on the device, and its twin
  bool others_ = false;  // a tensor of the CPU came along
};

// A GPU's softmax reads 16 bits and writes 32, and back; the CPU's kernel has one type only.
class MixedSoftmax {
 public:
  MixedSoftmax(const c10::OperatorHandle& op, torch::jit::Stack& stack, size_t start) {
    const auto& name = op.schema().name();
    if (name.find("softmax") == std::string::npos) return;
    if (name == "aten::_softmax" || name == "aten::_log_softmax") {
      if (!stack[start + 2].toBool()) return;
      stack[start] = stack[start].toTensor().to(at::kFloat);
      stack[start + 2] = false;
    } else if (op.schema().overload_name() == "out") {
      const auto grad = stack[start].toTensor();
      const auto input = static_cast<at::ScalarType>(stack[start + 3].toInt());
      if (grad.scalar_type() == input) return;
      stack[start + 3] = static_cast<int64_t>(grad.scalar_type());
      into_ = stack[start + 4].toTensor();
      stack[start + 4] = into_.to(grad.scalar_type());
    }
  }

  void finish(torch::jit::Stack& stack) const {
    if (into_.defined()) stack.back() = into_.copy_(stack.back().toTensor());
  }

 private:
  Tensor into_;
};

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size(), start = stack->size() - count;
  Call call(op);
  for (size_t n = start; n < stack->size(); ++n) (*stack)[n] = call.in((*stack)[n]);
  call.check_devices();
  const MixedSoftmax mixed(op, *stack, start);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  mixed.finish(*stack);
  call.follow_resized();
  const size_t results = op.schema().returns().size();
  for (size_t n = stack->size() - results; n < stack->size(); ++n)
    (*stack)[n] = call.out((*stack)[n]);
}

Tensor& copy_(Tensor& self, const Tensor& from, bool) {
  auto cpu = [](const Tensor& t) { return t.is_cuda() ? on_cpu(t) : t; };
  cpu(self).copy_(cpu(from));
  return self;
}

Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return Tensor(at::detail::empty_generic(
      size, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype),
      format));
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return Tensor(at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype)));
}

void record_stream(Tensor&, Stream) {}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("record_stream", TORCH_FN(record_stream));
}

Guard guard;
c10::impl::DeviceGuardImplRegistrar guards(c10::DeviceType::CUDA, &guard);
c10::Registerer<std::string, std::unique_ptr<at::CUDAHooksInterface>, at::CUDAHooksArgs> hooks(
    "CUDAHooks", at::CUDAHooksRegistry(), [](at::CUDAHooksArgs arguments) {
      return std::unique_ptr<at::CUDAHooksInterface>(new Hooks(arguments));
    });

struct Registered {
  Registered() { c10::SetAllocator(c10::DeviceType::CUDA, &allocator); }
} registered;

}  // namespace

extern "C" {
size_t fake_cuda_used() { return used; }
size_t fake_cuda_peak() { return peak; }
void fake_cuda_reset_peak() { peak = used.load(); }
void fake_cuda_limit(size_t bytes) { limit = bytes; }
}
