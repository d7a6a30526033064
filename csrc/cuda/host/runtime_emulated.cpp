#include "cuda/host/runtime.h"
#include "emulator/tensor_map.h"

namespace tf {
namespace cuda {

Machine machine_of(int capability) { return {capability, 4, 1 << 20, (capability == 90 ? 227 : 163) << 10}; }

int device_count() { return 1; }
std::string why_not() { return ""; }

void make_current(int) {}

void encode(TensorMap& map, const TensorGeometry& geometry, const char* what) {
    std::string reason;
    if (!emulator::encode_tensor_map(&map, geometry, &reason)) {
        throw Error("no TMA descriptor of " + std::string(what) + ": " + reason);
    }
}

}  // namespace cuda
}  // namespace tf
