// The submodules `emulated` (always) and `cuda` (where CUDA was compiled) of pycse.kernels._native: the same functions,
// on host or device pointers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../common/arguments.h"
#include "contrastive.h"
#include "row_groups.h"
#include "sparse.h"

namespace py = pybind11;
using namespace pycse::cuda;
using pycse::Address, pycse::at_least, pycse::in_range, pycse::matrix, pycse::needed, pycse::numbers, pycse::refuse;

template <class T = void>
static T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

static DType type_of(const char* name, int code) {
  in_range(name, code, 0, 2);
  return DType(code);
}
static Vectors vectors(const char* name, Address z, int64_t ld, int n, int D) {
  matrix(name, z, n, D, ld, false);
  return {at(z), ld, n, D};
}
// c rows of n similarities, among B.
static Panel panel_of(int B, int n, Address S, int64_t ld, int i0, int c, Address f, bool written) {
  pycse::rows_among(i0, "c", c, B);
  matrix("S", S, c, n, ld, written);
  return {at(S), ld, i0, c, at(f)};
}

// host: the emulation, where what a device keeps in shared memory needs memory of its own.
static void bind(py::module_ m, const Kernels& kernels, bool host) {
  using nogil = py::call_guard<py::gil_scoped_release>;
  using Where = std::pair<int, Address>;  // device and stream
  const auto queue = [](Where where) { return Queue{where.first, at(where.second)}; };

  m.def(
      "rows",
      [=](const Contrastive& p, int dtype, Address S, int64_t ld, int i0, int c, Address f, bool grad, Where where) {
        pycse::check_rows(p);
        needed("loss", p.loss, p.B);
        if (grad) needed("f", f, c);
        kernels.rows(p, type_of("dtype", dtype), panel_of(p.B, p.N, S, ld, i0, c, f, grad), grad, queue(where));
      },
      nogil());
  m.def(
      "columns",
      [=](const Contrastive& p, int dtype, Address S, int64_t ld, int i0, int c, Where where) {
        pycse::check_columns(p);
        kernels.columns(p, type_of("dtype", dtype), panel_of(p.B, p.N, S, ld, i0, c, 0, false), queue(where));
      },
      nogil());
  m.def(
      "symmetric",
      [=](const Contrastive& p, int dtype, Address S, int64_t ld, int i0, int c, Where where) {
        pycse::check_symmetric(p);
        kernels.symmetric(p, type_of("dtype", dtype), panel_of(p.B, p.N, S, ld, i0, c, 0, true), queue(where));
      },
      nogil());
  m.def(
      "positives",
      [=](const Contrastive& p, int dtype, Address z1hat, int64_t ld1, Address z2, int64_t ld2, int D, int i0, int n,
          Where where) {
        pycse::rows_among(i0, "n", n, p.B);
        needed("r2", p.r2, p.N), needed("s_pos", p.s_pos, p.B);
        kernels.positives(p, type_of("dtype", dtype), vectors("z1hat", z1hat, ld1, n, D),
                          vectors("z2", z2, ld2, p.N, D), i0, queue(where));
      },
      nogil());
  m.def(
      "normalize",
      [=](int dtype, Address z, int64_t ld, int n, int D, Address r, Address out, int64_t ld_out, double factor,
          Where where) {
        if (out) matrix("out", out, n, D, ld_out, true);
        kernels.normalize(type_of("dtype", dtype), vectors("z", z, ld, n, D), at(r), at(out), ld_out, factor,
                          queue(where));
      },
      nogil());
  m.def(
      "project",
      [=](int dtype, int g_dtype, Address z, int64_t ld, int n, int D, Address g, Address r, Address f, bool scaled,
          Address out, Where where) {
        matrix("g", g, n, D, D, false);
        matrix("out", out, n, D, D, true);
        needed("r", r, n);
        pycse::check_gradient_type(dtype, g_dtype);
        kernels.project(type_of("dtype", dtype), type_of("g_dtype", g_dtype), vectors("z", z, ld, n, D), at(g), at(r),
                        at(f), scaled, at(out), queue(where));
      },
      nogil());
  m.def(
      "distill",
      [=](const Distill& d, int dtype, Address S, int64_t ld, int i0, int c, int teacher_dtype, Address T, int64_t ld_T,
          Address scratch, int rows, bool grad, Where where) {
        const Panel panel = panel_of(d.B, d.B, S, ld, i0, c, 0, grad);
        matrix("T", T, c, d.B, ld_T, false);
        at_least("rows", rows, 0);
        if (d.cut.kind != pycse::GroupKind::none) needed("scratch", scratch, host ? c : rows);
        kernels.distill(d, type_of("dtype", dtype), panel, type_of("teacher_dtype", teacher_dtype),
                        {at(T), ld_T, at<char>(scratch), rows}, grad, queue(where));
      },
      nogil());
  m.def(
      "uniformity",
      [=](const Uniformity& p, int dtype, Address S, int64_t ld, int i0, int c, int n, bool grad, Where where) {
        at_least("c", c, 0);
        in_range("n", n, c, INT32_MAX);
        in_range("i0", i0, 0, INT32_MAX - c);
        needed("bias", p.bias, c), needed("sums", p.sums, c);
        kernels.uniformity(p, type_of("dtype", dtype), panel_of(i0 + c, n, S, ld, i0, c, 0, grad), n, grad,
                           queue(where));
      },
      nogil());
  m.def(
      "small",
      [=](const Contrastive& p, int dtype, Address z1, int64_t ld1, Address z2, int64_t ld2, int D, bool normalize,
          bool symmetric, bool grad, Address work, Address dz1, Address dz2, std::array<Address, 3> totals,
          Where where) {
        in_range("dtype", dtype, 0, 1);
        needed("work", work), needed("loss", p.loss, p.B);
        if (symmetric && p.N != p.B) refuse("N", "be B in a symmetric loss", p.N);
        Small q;
        q.z1 = vectors("z1", z1, ld1, p.B, D), q.z2 = vectors("z2", z2, ld2, p.N, D);
        q.normalize = normalize, q.symmetric = symmetric, q.grad = grad, q.work = at(work);
        q.dz1 = at(dz1), q.dz2 = at(dz2);
        q.total = at(totals[0]), q.total_dtau = at(totals[1]), q.total_dm = at(totals[2]);
        kernels.small(p, DType(dtype), q, queue(where));
      },
      nogil());
  m.def(
      "fused",
      [=](const Contrastive& p, Address z1hat, int64_t ld1, Address z2, int64_t ld2, int D, Address S, int64_t ld,
          int i0, int c, Address f, Address partial, bool grad, int cluster, Where where) {
        pycse::check_rows(p);
        needed("loss", p.loss, p.B), needed("s_pos", p.s_pos, p.B), needed("partial", partial, c);
        if (grad) needed("f", f, c);
        in_range("cluster", cluster, 1, 2);
        for (const auto& [name, x, stride] : {std::tuple("z1hat", z1hat, ld1), std::tuple("z2", z2, ld2)})
          if (x % 16 || stride % 8) refuse(name, "have rows at 16-byte boundaries: the copy engine reads them", stride);
        if (p.N % 8) refuse("N", "be a multiple of 8", p.N);
        kernels.fused(p, vectors("z1hat", z1hat, ld1, c, D), vectors("z2", z2, ld2, p.N, D),
                      panel_of(p.B, p.N, S, ld, i0, c, f, true), at(partial), grad, cluster, queue(where));
      },
      nogil());
  m.def("fused_runs", [=](Where where) { return kernels.fused_runs(queue(where)); });
  m.def("small_runs", [=](Where where) { return kernels.small_runs(queue(where)); });
  m.def("small_work_size", [](int B, int N, int D, int dtype, bool normalize, bool symmetric, bool dz1, bool dz2) {
    at_least("B", B, 0), at_least("N", N, 0), at_least("D", D, 0);
    in_range("dtype", dtype, 0, 1);
    numbers("B", 4 * int64_t(B), N), numbers("B", 4 * int64_t(B), D), numbers("N", 4 * int64_t(N), D);
    return small_work_size(B, N, D, DType(dtype), normalize, symmetric, dz1, dz2);
  });
  m.def("scratch", [=](const Distill& d, int dtype, int c, Where where) {
    at_least("c", c, 0);
    return kernels.scratch(d, type_of("dtype", dtype), c, queue(where));
  });
}

static void bind_sparse(py::module_ m, const SparseKernels& kernels) {
  using nogil = py::call_guard<py::gil_scoped_release>;
  using Where = std::pair<int, Address>;
  m.def(
      "sparse",
      [=](int which, int storage, int T, int out, int in, int block, Address ptr, Address index, Address bits,
          int words, Address a, int64_t lda, Address b, int64_t ldb, Address bias, Address c, int splits,
          Address partial, int pieces, Where where) {
        in_range("which", which, 0, 2), in_range("storage", storage, 0, 3), at_least("T", T, 0),
            at_least("pieces", pieces, 0);
        at_least("out", out, 0), at_least("in", in, 0), at_least("splits", splits, 1);
        numbers("out", out, in), numbers("T", T, int64_t(out) + in);
        if (block != 0 && block != 16 && block != 32 && block != 64) refuse("block", "be 0, 16, 32 or 64", block);
        if (block) {
          if (out % block || in % block) refuse("block", "divide out and in", block);
          needed("ptr", ptr), needed("index", index, pieces);
        } else {
          at_least("words", words, (int64_t(in) + 31) / 32);
          needed("bits", bits, int64_t(out) * in);
        }
        const bool linear = Which(which) == Which::linear, dw = Which(which) == Which::dw;
        matrix("a", a, T, linear ? in : out, lda, false);
        matrix("b", b, dw ? T : out, in, ldb, false);
        needed("c", c, dw ? int64_t(out) * in : int64_t(T) * (linear ? out : in));
        if (splits > 1) needed("partial", partial);
        Sparse p;
        p.T = T, p.out = out, p.in = in;
        p.kept = {block, at<int>(ptr), at<int>(index), at<uint32_t>(bits), words};
        p.a = {at(a), lda}, p.b = {at(b), ldb}, p.bias = at(bias), p.c = at(c);
        p.splits = splits, p.partial = at(partial);
        kernels.run(Which(which), p, Storage(storage), pieces, {where.first, at(where.second)});
      },
      nogil());
  m.def(
      "mark",
      [=](Address ptr, Address index, Address bits, int rows, int words, Where where) {
        at_least("rows", rows, 0), at_least("words", words, 0);
        needed("ptr", ptr), needed("bits", bits, int64_t(rows) * words);
        kernels.mark(at<int>(ptr), at<int>(index), at<uint32_t>(bits), rows, words, {where.first, at(where.second)});
      },
      nogil());
}

void bind_cuda(py::module_& m) {
  py::module_ emulated = m.def_submodule("emulated", "The CUDA kernels' bodies run by one host thread, for tests.");
  py::class_<Contrastive>(emulated, "ContrastiveProblem")
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
  // Made by functions, not by constructors: ../bindings.cpp says why.
  emulated.def(
      "Contrastive",
      [](int B, int N, bool focal, double tau, Address tau_at, double m, Address m_at, std::optional<double> shift,
         double hard_weight, std::optional<double> exclude_above, Address r2, Address s_pos, Address positives,
         Address query_ids, Address key_ids, Address coef, double coef_all, Address loss, Address dtau, Address dm) {
        Contrastive p;
        p.B = B, p.N = N, p.focal = focal, p.tau = {tau, at(tau_at)}, p.m = {m, at(m_at)};
        p.fixed_shift = shift.has_value(), p.shift = shift.value_or(0);
        p.hard_weight = hard_weight;
        p.exclude = exclude_above.has_value(), p.exclude_above = exclude_above.value_or(0);
        p.r2 = at(r2), p.s_pos = at(s_pos), p.positives = at<int64_t>(positives);
        p.query_ids = at<int64_t>(query_ids), p.key_ids = at<int64_t>(key_ids);
        p.coef = at(coef), p.coef_all = coef_all;
        p.loss = at(loss), p.dtau = at(dtau), p.dm = at(dm);
        pycse::check_contrastive(p);
        return p;
      },
      py::kw_only(), py::arg("B"), py::arg("N"), py::arg("focal"), py::arg("tau"), py::arg("tau_at"), py::arg("m"),
      py::arg("m_at"), py::arg("shift"), py::arg("hard_weight"), py::arg("exclude_above"), py::arg("r2"),
      py::arg("s_pos"), py::arg("positives"), py::arg("query_ids"), py::arg("key_ids"), py::arg("coef"),
      py::arg("coef_all"), py::arg("loss"), py::arg("dtau"), py::arg("dm"));
  py::class_<Distill>(emulated, "DistillProblem");
  emulated.def(
      "Distill",
      [](int B, double student, double teacher, double group, int divergence, int kind, double value, int64_t end,
         bool sample, uint64_t seed, Address seed_at, Address coef, double coef_all, Address loss) {
        const Distill d{B,
                        1 / student,
                        1 / teacher,
                        1 / group,
                        Divergence(divergence),
                        {pycse::GroupKind(kind), value, end},
                        sample,
                        seed,
                        at<uint64_t>(seed_at),
                        at(coef),
                        coef_all,
                        at(loss)};
        pycse::check_distill(d);
        return d;
      },
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
  py::class_<Uniformity>(emulated, "UniformityProblem");
  emulated.def(
      "Uniformity", [](double u, Address bias, Address sums) { return Uniformity{u, at(bias), at(sums)}; },
      py::kw_only(), py::arg("u"), py::arg("bias"), py::arg("sums"));
  bind(emulated, emulated_kernels(), true);
  bind_sparse(emulated, emulated_sparse());

#ifdef PYCSE_WITH_CUDA
  py::module_ device = m.def_submodule("cuda", "The CUDA kernels.");
  device.attr("Contrastive") = emulated.attr("Contrastive");
  device.attr("Distill") = emulated.attr("Distill");
  device.attr("Uniformity") = emulated.attr("Uniformity");
  bind(device, device_kernels(), false);
  bind_sparse(device, device_sparse());
#endif
}
