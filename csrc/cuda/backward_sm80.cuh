// The backward pass of the sm_80 family: mma.sync, ldmatrix, cp.async; deterministic by construction.
#pragma once

#include "cuda/backward_dkdv_sm80.cuh"
#include "cuda/backward_dq_sm80.cuh"
#include "cuda/backward_rows.cuh"
