// Functions that host and device share. On the host they are always inlined: kernels/cpu compiles them once for each
// instruction set, and a copy that the linker picked would be of any of them.
#pragma once

#ifdef __CUDACC__
#define PYCSE_HD __host__ __device__ __forceinline__
#else
#define PYCSE_HD inline __attribute__((always_inline))
#endif
