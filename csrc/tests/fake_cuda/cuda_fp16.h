// Stand-in for CUDA's header: names only, since the host computes with neither type.
#pragma once

#include "cuda_runtime.h"

struct __half {};
struct __half2 {};
float __half2float(__half);
__half __float2half_rn(float);
__half2 __floats2half2_rn(float, float);
