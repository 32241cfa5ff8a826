// For functions that CPU and CUDA code share.
#pragma once

#if defined(__CUDACC__)
#define MIWV_HOST_DEVICE __host__ __device__
#else
#define MIWV_HOST_DEVICE
#endif
