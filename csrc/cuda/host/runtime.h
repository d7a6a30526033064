// The few things that the host asks of CUDA, or of the emulator in its place.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/host/kernel_info.h"

namespace tf {
namespace cuda {

// What went wrong, in words; by the emulator too.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Machine {
    int capability = 80;  // 80 for compute capability 8.0
    int num_sms = 1;
    int64_t l2_bytes = 0;
    int64_t shared_bytes = 0;  // that one block can have
};

// What launches are chosen by. The emulator is asked for a compute capability instead, 80 or 90, and plays a machine so
// small that tests see splits and queues.
Machine machine_of(int device);
// Devices that can be used; 0 where there are none or no driver.
int device_count();
// Why there is no device, or "" where there is one.
std::string why_not();

// Makes a device current to this thread. The caller has made it PyTorch's, and gives back the one before.
void make_current(int device);

// Encodes a TMA descriptor. Throws Error; `what` names the operand in it.
void encode(TensorMap&, const TensorGeometry&, const char* what);

}  // namespace cuda
}  // namespace tf
