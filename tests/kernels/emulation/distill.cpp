// distill.h and uniformity.h on the host.
#include "../../../kernels/common/arguments.h"
#include "../../../kernels/cuda/distill.h"
#include "../../../kernels/cuda/uniformity.h"
#include "host.h"

namespace pycse::cuda {

void distill(const Distill& d, DType dtype, const Panel& panel, DType teacher_type, const Teacher& teacher, bool grad,
             Queue) {
  if (d.cut.kind != GroupKind::none) needed("scratch", teacher.scratch, panel.c);  // a device's is shared memory
  distill_variant(dtype, teacher_type, d.B > kMostNarrow, [&](auto type, auto teachers, auto index) {
    RowTables few;
    blocks(panel.c, [&](auto block, int k) {
      distill_row<decltype(type), decltype(teachers), decltype(index)>(block, d, panel, teacher, k, grad, few,
                                                                       teacher.scratch);
    });
  });
}

std::pair<int, int64_t> scratch(const Distill& d, DType dtype, int, Queue) {
  return {1, row_bytes(d, dtype, d.B > kMostNarrow ? 4 : 2)};
}

void uniformity(const Uniformity& p, DType dtype, const Panel& panel, int n, bool grad, Queue) {
  uniformity_variant(dtype, grad, [&](auto type, auto grad) {
    blocks(panel.c,
           [&](auto block, int k) { uniformity_row<decltype(type), decltype(grad)::value>(block, p, panel, n, k); });
  });
}

}  // namespace pycse::cuda
