// One instruction set's kernels. CMake compiles this file once for each (PYCSE_ISA = portable, v3, v4 with the
// matching -march on x86-64), so every loop below is vectorised for it; dispatch.cpp picks one at run time.
#include "adapacse.h"
#include "distill.h"
#include "kernels.h"
#include "norms.h"
#include "prefixes.h"
#include "rows.h"
#include "sigmoid.h"
#include "small.h"
#include "small_prefixes.h"
#include "small_distill.h"
#include "sparse.h"
#include "supervised.h"
#include "symmetric.h"
#include "uniformity.h"

#define PYCSE_STRING2(x) #x
#define PYCSE_STRING(x) PYCSE_STRING2(x)

namespace pycse::PYCSE_ISA {
Kernels kernels() {
  Kernels table;
  table.isa = PYCSE_STRING(PYCSE_ISA);
#define PYCSE_FILL(name, result, arguments) table.name = name;
  PYCSE_CPU_KERNELS(PYCSE_FILL)
#undef PYCSE_FILL
  return table;
}
}  // namespace pycse::PYCSE_ISA
