// A CUDA device guard that guards nothing. Slicing or moving a tensor enters one in C++, fake tensors
// too, and a libtorch without CUDA has none to enter. A build with CUDA installs the like itself.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceType;

struct FakeCudaGuard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

C10_REGISTER_GUARD_IMPL(CUDA, FakeCudaGuard)

}  // namespace
