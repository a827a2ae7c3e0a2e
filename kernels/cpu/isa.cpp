// One instruction set's kernels. CMake compiles this file once for each (PYCSE_ISA = portable, v3, v4 with the
// matching -march on x86-64), so every loop below is vectorised for it; dispatch.cpp picks one at run time.
#include "distill.h"
#include "norms.h"
#include "rows.h"
#include "small.h"
#include "small_distill.h"
#include "sparse.h"
#include "symmetric.h"
#include "uniformity.h"

#define PYCSE_STRING2(x) #x
#define PYCSE_STRING(x) PYCSE_STRING2(x)

namespace pycse::PYCSE_ISA {
Kernels kernels() {
  return {PYCSE_STRING(PYCSE_ISA),
          rows,
          columns,
          symmetric,
          normalize,
          project,
          positives,
          small,
          distill,
          small_distill,
          uniformity,
          sparse_product,
          sparse_outer,
          sparse_pack,
          mask_weight};
}
}  // namespace pycse::PYCSE_ISA
