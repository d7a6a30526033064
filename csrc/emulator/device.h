// The types of cuda/device.cuh, for files of the emulator that are compiled without TF_EMULATED.
#pragma once

#if !defined(TF_EMULATED)
#define TF_EMULATED 1
#endif

#include "cuda/device.cuh"
