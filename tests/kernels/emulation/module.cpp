// The tests' module _emulated: the functions of pycse.kernels._native.cuda on host pointers, and what only tests ask
// for.
#include <pybind11/pybind11.h>

#include "../../../kernels/cuda/row_groups.h"
#include "host.h"

namespace py = pybind11;
using namespace pycse;

void bind_cuda(py::module_& m);  // kernels/cuda/bindings.cpp

PYBIND11_MODULE(_emulated, m) {
  m.doc() = "The CUDA kernels' bodies on the host.";
  py::class_<Uniformity>(m, "UniformityProblem", py::module_local());
  bind_cuda(m);
  // The thread block: so many fibers, which run in ascending order or in descending; 0 for one thread.
  m.def("emulate_with", [](int threads, bool ascending) {
    if (threads % 32 || threads < 0 || threads > 1024)
      throw std::invalid_argument("threads of a block: whole warps, at most 1024");
    cuda::block_threads = threads, cuda::ascending = ascending;
  });
  // Of a row's scratch: bytes to `column` and to the ranks that draw() leaves, and bytes of an index.
  m.def("row_layout", [](const cuda::Distill& d, int dtype) {
    const int index = d.B > cuda::kMostNarrow ? 4 : 2;
    const cuda::RowLayout layout(d.B, DType(dtype) == DType::f64 ? 8 : 4, index, cuda::few_groups(d.cut, d.B));
    return py::make_tuple(layout.column, layout.ends, index);
  });
}
