// TMA descriptors: what cuTensorMapEncodeTiled does, and what TMA reads.
#pragma once

#include <string>

#include "emulator/device.h"

namespace tf::emulator {

// False, with the reason in `why_not`, for what cuTensorMapEncodeTiled refuses.
bool encode_tensor_map(TensorMap*, const TensorGeometry&, std::string* why_not);

// False for what encode_tensor_map has not written.
bool decode_tensor_map(const TensorMap*, TensorGeometry*);

int box_bytes(const TensorGeometry&);

}  // namespace tf::emulator
