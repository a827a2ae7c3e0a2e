// The submodules `emulated` (always) and `cuda` (where CUDA was compiled) of pycse.kernels._native: the same functions, on
// host or device pointers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "contrastive.h"
#include "row_groups.h"
#include "sparse.h"

namespace py = pybind11;
using namespace pycse::cuda;
using Address = std::uintptr_t;  // a tensor's data_ptr(), 0 for none

template <class T = void>
static T* at(Address address) { return reinterpret_cast<T*>(address); }

static Vectors vectors(Address z, int64_t ld, int n, int D) { return {at(z), ld, n, D}; }
static Panel panel(Address S, int64_t ld, int i0, int c, Address f) { return {at(S), ld, i0, c, at(f)}; }

static void bind(py::module_ m, const Kernels& kernels) {
  using nogil = py::call_guard<py::gil_scoped_release>;
  using Where = std::pair<int, Address>;  // device and stream
  const auto queue = [](Where where) { return Queue{where.first, at(where.second)}; };

  m.def("rows",
        [=](const Contrastive& p, int dtype, Address S, int64_t ld, int i0, int c, Address f, bool grad, Where where) {
          kernels.rows(p, DType(dtype), panel(S, ld, i0, c, f), grad, queue(where));
        },
        nogil());
  m.def("columns",
        [=](const Contrastive& p, int dtype, Address S, int64_t ld, int i0, int c, Where where) {
          kernels.columns(p, DType(dtype), panel(S, ld, i0, c, 0), queue(where));
        },
        nogil());
  m.def("symmetric",
        [=](const Contrastive& p, int dtype, Address S, int64_t ld, int i0, int c, Where where) {
          kernels.symmetric(p, DType(dtype), panel(S, ld, i0, c, 0), queue(where));
        },
        nogil());
  m.def("positives",
        [=](const Contrastive& p, int dtype, Address z1hat, int64_t ld1, Address z2, int64_t ld2, int D, int i0, int n,
            Where where) {
          kernels.positives(p, DType(dtype), vectors(z1hat, ld1, n, D), vectors(z2, ld2, p.N, D), i0, queue(where));
        },
        nogil());
  m.def("normalize",
        [=](int dtype, Address z, int64_t ld, int n, int D, Address r, Address out, int64_t ld_out, double factor,
            Where where) {
          kernels.normalize(DType(dtype), vectors(z, ld, n, D), at(r), at(out), ld_out, factor, queue(where));
        },
        nogil());
  m.def("project",
        [=](int dtype, int g_dtype, Address z, int64_t ld, int n, int D, Address g, Address r, Address f, bool scaled,
            Address out, Where where) {
          kernels.project(DType(dtype), DType(g_dtype), vectors(z, ld, n, D), at(g), at(r), at(f), scaled, at(out),
                          queue(where));
        },
        nogil());
  m.def("distill",
        [=](const Distill& d, int dtype, Address S, int64_t ld, int i0, int c, int teacher_dtype, Address T, int64_t ld_T,
            Address scratch, int rows, bool grad, Where where) {
          kernels.distill(d, DType(dtype), panel(S, ld, i0, c, 0), DType(teacher_dtype), {at(T), ld_T, at<char>(scratch), rows},
                          grad, queue(where));
        },
        nogil());
  m.def("uniformity",
        [=](const Uniformity& p, int dtype, Address S, int64_t ld, int i0, int c, int n, bool grad, Where where) {
          kernels.uniformity(p, DType(dtype), panel(S, ld, i0, c, 0), n, grad, queue(where));
        },
        nogil());
  m.def("small",
        [=](const Contrastive& p, int dtype, Address z1, int64_t ld1, Address z2, int64_t ld2, int D, bool normalize,
            bool symmetric, bool grad, Address work, Address dz1, Address dz2, std::array<Address, 3> totals,
            Where where) {
          Small q;
          q.z1 = vectors(z1, ld1, p.B, D), q.z2 = vectors(z2, ld2, p.N, D);
          q.normalize = normalize, q.symmetric = symmetric, q.grad = grad, q.work = at(work);
          q.dz1 = at(dz1), q.dz2 = at(dz2);
          q.total = at(totals[0]), q.total_dtau = at(totals[1]), q.total_dm = at(totals[2]);
          kernels.small(p, DType(dtype), q, queue(where));
        },
        nogil());
  m.def("fused",
        [=](const Contrastive& p, Address z1hat, int64_t ld1, Address z2, int64_t ld2, int D, Address S, int64_t ld, int i0,
            int c, Address f, Address partial, bool grad, int cluster, Where where) {
          kernels.fused(p, vectors(z1hat, ld1, c, D), vectors(z2, ld2, p.N, D), panel(S, ld, i0, c, f), at(partial), grad,
                        cluster, queue(where));
        },
        nogil());
  m.def("fused_runs", [=](Where where) { return kernels.fused_runs(queue(where)); });
  m.def("small_runs", [=](Where where) { return kernels.small_runs(queue(where)); });
  m.def("small_work_size", [](int B, int N, int D, int dtype, bool normalize, bool symmetric, bool dz1, bool dz2) {
    return small_work_size(B, N, D, DType(dtype), normalize, symmetric, dz1, dz2);
  });
  m.def("scratch", [=](const Distill& d, int dtype, int c, Where where) {
    return kernels.scratch(d, DType(dtype), c, queue(where));
  });
}

static void bind_sparse(py::module_ m, const SparseKernels& kernels) {
  using nogil = py::call_guard<py::gil_scoped_release>;
  using Where = std::pair<int, Address>;
  m.def("sparse",
        [=](int which, int storage, int T, int out, int in, int block, Address ptr, Address index, Address bits, int words,
            Address a, int64_t lda, Address b, int64_t ldb, Address bias, Address c, int splits, Address partial,
            int pieces, Where where) {
          Sparse p;
          p.T = T, p.out = out, p.in = in;
          p.kept = {block, at<int>(ptr), at<int>(index), at<uint32_t>(bits), words};
          p.a = {at(a), lda}, p.b = {at(b), ldb}, p.bias = at(bias), p.c = at(c);
          p.splits = splits, p.partial = at(partial);
          kernels.run(Which(which), p, Storage(storage), pieces, {where.first, at(where.second)});
        },
        nogil());
  m.def("mark",
        [=](Address ptr, Address index, Address bits, int rows, int words, Where where) {
          kernels.mark(at<int>(ptr), at<int>(index), at<uint32_t>(bits), rows, words, {where.first, at(where.second)});
        },
        nogil());
}

void bind_cuda(py::module_& m) {
  py::module_ emulated = m.def_submodule("emulated", "The CUDA kernels' bodies run by one host thread, for tests.");
  py::class_<Contrastive>(emulated, "Contrastive")
      .def(py::init([](int B, int N, bool focal, double tau, Address tau_at, double m, Address m_at,
                       std::optional<double> shift, double hard_weight, std::optional<double> exclude_above, Address r2,
                       Address s_pos, Address positives, Address query_ids, Address key_ids, Address coef, double coef_all,
                       Address loss, Address dtau, Address dm) {
             Contrastive p;
             p.B = B, p.N = N, p.focal = focal, p.tau = {tau, at(tau_at)}, p.m = {m, at(m_at)};
             p.fixed_shift = shift.has_value(), p.shift = shift.value_or(0);
             p.hard_weight = hard_weight;
             p.exclude = exclude_above.has_value(), p.exclude_above = exclude_above.value_or(0);
             p.r2 = at(r2), p.s_pos = at(s_pos), p.positives = at<int64_t>(positives);
             p.query_ids = at<int64_t>(query_ids), p.key_ids = at<int64_t>(key_ids);
             p.coef = at(coef), p.coef_all = coef_all;
             p.loss = at(loss), p.dtau = at(dtau), p.dm = at(dm);
             return p;
           }),
           py::kw_only(), py::arg("B"), py::arg("N"), py::arg("focal"), py::arg("tau"), py::arg("tau_at"), py::arg("m"),
           py::arg("m_at"), py::arg("shift"), py::arg("hard_weight"), py::arg("exclude_above"), py::arg("r2"),
           py::arg("s_pos"), py::arg("positives"), py::arg("query_ids"), py::arg("key_ids"), py::arg("coef"),
           py::arg("coef_all"), py::arg("loss"), py::arg("dtau"), py::arg("dm"))
      .def(
          "symmetric_state",
          [](Contrastive& p, Address lpos, Address lneg, Address column_max, Address column_sum, Address lneg_column,
             Address lse_column) {
            p.lpos = at(lpos), p.lneg = at(lneg);
            p.column_max = at(column_max), p.column_sum = at(column_sum);
            p.lneg_column = at(lneg_column), p.lse_column = at(lse_column);
          },
          py::kw_only(), py::arg("lpos"), py::arg("lneg"), py::arg("column_max"), py::arg("column_sum"),
          py::arg("lneg_column"), py::arg("lse_column"));
  py::class_<Distill>(emulated, "Distill")
      .def(py::init([](int B, double student, double teacher, double group, int divergence, int kind, double value,
                       int64_t end, bool sample, uint64_t seed, Address seed_at, Address coef, double coef_all,
                       Address loss) {
             return Distill{B, 1 / student, 1 / teacher, 1 / group, Divergence(divergence),
                            {pycse::GroupKind(kind), value, end}, sample, seed, at<uint64_t>(seed_at), at(coef), coef_all,
                            at(loss)};
           }),
           py::kw_only(), py::arg("B"), py::arg("student_temperature"), py::arg("teacher_temperature"),
           py::arg("group_temperature"), py::arg("divergence"), py::arg("grouping"), py::arg("group_value"),
           py::arg("group_end"), py::arg("sample"), py::arg("seed"), py::arg("seed_at"), py::arg("coef"),
           py::arg("coef_all"), py::arg("loss"));
  emulated.def("emulate_with", &emulate_with);
  // Of a row's scratch: bytes to `column` and to the ranks that draw() leaves, and bytes of an index.
  emulated.def("row_layout", [](const Distill& d, int dtype) {
    const int index = d.B > kMostNarrow ? 4 : 2;
    const RowLayout layout(d.B, DType(dtype) == DType::f64 ? 8 : 4, index, few_groups(d.cut, d.B));
    return std::make_tuple(layout.column, layout.ends, index);
  });
  py::class_<Uniformity>(emulated, "Uniformity")
      .def(py::init([](double u, Address bias, Address sums) { return Uniformity{u, at(bias), at(sums)}; }), py::kw_only(),
           py::arg("u"), py::arg("bias"), py::arg("sums"));
  bind(emulated, emulated_kernels());
  bind_sparse(emulated, emulated_sparse());

#ifdef PYCSE_WITH_CUDA
  py::module_ device = m.def_submodule("cuda", "The CUDA kernels.");
  device.attr("Contrastive") = emulated.attr("Contrastive");
  device.attr("Distill") = emulated.attr("Distill");
  device.attr("Uniformity") = emulated.attr("Uniformity");
  bind(device, device_kernels());
  bind_sparse(device, device_sparse());
#endif
}
