#include "launch.h"

#include "../device/device_api.h"

namespace gpt2fast::launch {

void use_device(int index) { device::use_device(index); }

}  // namespace gpt2fast::launch
