// The CUDA kernels for Python: the submodule `cuda` of pycse.kernels._native, on device pointers. Also, on the host's,
// the tests' own module (tests/kernels/emulation).
#include "../common/bindings.h"
#include "contrastive.h"
#include "small.h"
#include "sparse.h"

namespace py = pybind11;
using namespace pycse;
using namespace pycse::cuda;
using nogil = py::call_guard<py::gil_scoped_release>;
using Where = std::pair<int, Address>;  // device and stream

static Queue queue(Where where) { return {where.first, at(where.second)}; }
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
  rows_among(i0, "c", c, B);
  matrix("S", S, c, n, ld, written);
  return {at(S), ld, i0, c, at(f)};
}

static void bind(py::module_& m) {
  m.def(
      "rows",
      [](const Contrastive& p, int dtype, Address S, int64_t ld, int i0, int c, Address f, bool grad, Where where) {
        check_rows(p);
        needed("loss", p.loss, p.B);
        if (grad) needed("f", f, c);
        cuda::rows(p, type_of("dtype", dtype), panel_of(p.B, p.N, S, ld, i0, c, f, grad), grad, queue(where));
      },
      nogil());
  m.def(
      "columns",
      [](const Contrastive& p, int dtype, Address S, int64_t ld, int i0, int c, Where where) {
        check_columns(p);
        cuda::columns(p, type_of("dtype", dtype), panel_of(p.B, p.N, S, ld, i0, c, 0, false), queue(where));
      },
      nogil());
  m.def(
      "symmetric",
      [](const Contrastive& p, int dtype, Address S, int64_t ld, int i0, int c, Where where) {
        check_symmetric(p);
        cuda::symmetric(p, type_of("dtype", dtype), panel_of(p.B, p.N, S, ld, i0, c, 0, true), queue(where));
      },
      nogil());
  m.def(
      "positives",
      [](const Contrastive& p, int dtype, Address z1hat, int64_t ld1, Address z2, int64_t ld2, int D, int i0, int n,
         Where where) {
        rows_among(i0, "n", n, p.B);
        needed("r2", p.r2, p.N), needed("s_pos", p.s_pos, p.B);
        cuda::positives(p, type_of("dtype", dtype), vectors("z1hat", z1hat, ld1, n, D), vectors("z2", z2, ld2, p.N, D),
                        i0, queue(where));
      },
      nogil());
  m.def(
      "normalize",
      [](int dtype, Address z, int64_t ld, int n, int D, Address r, Address out, int64_t ld_out, double factor,
         Where where) {
        if (out) matrix("out", out, n, D, ld_out, true);
        cuda::normalize(type_of("dtype", dtype), vectors("z", z, ld, n, D), at(r), at(out), ld_out, factor,
                        queue(where));
      },
      nogil());
  m.def(
      "project",
      [](int dtype, int g_dtype, Address z, int64_t ld, int n, int D, Address g, Address r, Address f, bool scaled,
         Address out, Where where) {
        matrix("g", g, n, D, D, false);
        matrix("out", out, n, D, D, true);
        needed("r", r, n);
        check_gradient_type(dtype, g_dtype);
        cuda::project(type_of("dtype", dtype), type_of("g_dtype", g_dtype), vectors("z", z, ld, n, D), at(g), at(r),
                      at(f), scaled, at(out), queue(where));
      },
      nogil());
  m.def(
      "distill",
      [](const Distill& d, int dtype, Address S, int64_t ld, int i0, int c, int teacher_dtype, Address T, int64_t ld_T,
         Address scratch, int rows, bool grad, Where where) {
        const Panel panel = panel_of(d.B, d.B, S, ld, i0, c, 0, grad);
        matrix("T", T, c, d.B, ld_T, false);
        at_least("rows", rows, 0);
        if (d.cut.kind != GroupKind::none) needed("scratch", scratch, rows);
        cuda::distill(d, type_of("dtype", dtype), panel, type_of("teacher_dtype", teacher_dtype),
                      {at(T), ld_T, at<char>(scratch), rows}, grad, queue(where));
      },
      nogil());
  m.def(
      "uniformity",
      [](const Uniformity& p, int dtype, Address S, int64_t ld, int i0, int c, int n, bool grad, Where where) {
        at_least("c", c, 0);
        in_range("n", n, c, INT32_MAX);
        in_range("i0", i0, 0, INT32_MAX - c);
        needed("bias", p.bias, c), needed("sums", p.sums, c);
        cuda::uniformity(p, type_of("dtype", dtype), panel_of(i0 + c, n, S, ld, i0, c, 0, grad), n, grad, queue(where));
      },
      nogil());
  m.def(
      "small",
      [](const Contrastive& p, int dtype, Address z1, int64_t ld1, Address z2, int64_t ld2, int D, bool normalize,
         bool symmetric, bool grad, Address work, Address dz1, Address dz2, Address total, Where where) {
        in_range("dtype", dtype, 0, 1);
        needed("work", work), needed("loss", p.loss, p.B);
        if (symmetric && p.N != p.B) refuse("N", "be B in a symmetric loss", p.N);
        Small q;
        q.z1 = vectors("z1", z1, ld1, p.B, D), q.z2 = vectors("z2", z2, ld2, p.N, D);
        q.normalize = normalize, q.symmetric = symmetric, q.grad = grad, q.work = at(work);
        q.dz1 = at(dz1), q.dz2 = at(dz2), q.total = at(total);
        cuda::small(p, DType(dtype), q, queue(where));
      },
      nogil());
  m.def(
      "fused",
      [](const Contrastive& p, Address z1hat, int64_t ld1, Address z2, int64_t ld2, int D, Address S, int64_t ld,
         int i0, int c, Address f, Address partial, bool grad, int cluster, Where where) {
        check_rows(p);
        needed("loss", p.loss, p.B), needed("s_pos", p.s_pos, p.B), needed("partial", partial, c);
        if (grad) needed("f", f, c);
        in_range("cluster", cluster, 1, 2);
        if (!p.fixed_shift || p.logit.at || p.exclude.given)
          throw std::invalid_argument("fused takes a fixed shift, coefficients that the host knows and no threshold");
        for (const auto& [name, x, stride] : {std::tuple("z1hat", z1hat, ld1), std::tuple("z2", z2, ld2)})
          if (x % 16 || stride % 8) refuse(name, "have rows at 16-byte boundaries: the copy engine reads them", stride);
        if (p.N % 8) refuse("N", "be a multiple of 8", p.N);
        cuda::fused(p, vectors("z1hat", z1hat, ld1, c, D), vectors("z2", z2, ld2, p.N, D),
                    panel_of(p.B, p.N, S, ld, i0, c, f, true), at(partial), grad, cluster, queue(where));
      },
      nogil());
  m.def("fused_runs", [](Where where) { return cuda::fused_runs(queue(where)); });
  m.def("small_runs", [](Where where) { return cuda::small_runs(queue(where)); });
  m.def("small_work_size", [](int B, int N, int D, int dtype, bool normalize, bool symmetric, bool dz1, bool dz2) {
    at_least("B", B, 0), at_least("N", N, 0), at_least("D", D, 0);
    in_range("dtype", dtype, 0, 1);
    numbers("B", 4 * int64_t(B), N), numbers("B", 4 * int64_t(B), D), numbers("N", 4 * int64_t(N), D);
    return small_work_size(B, N, D, DType(dtype), normalize, symmetric, dz1, dz2);
  });
  m.def("scratch", [](const Distill& d, int dtype, int c, Where where) {
    at_least("c", c, 0);
    return cuda::scratch(d, type_of("dtype", dtype), c, queue(where));
  });
}

static void bind_sparse(py::module_& m) {
  m.def(
      "sparse",
      [](int which, int storage, int T, int out, int in, int block, Address ptr, Address index, Address bits, int words,
         Address a, int64_t lda, Address b, int64_t ldb, Address bias, Address c, int splits, Address partial,
         int pieces, Where where) {
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
        sparse(Which(which), p, Storage(storage), pieces, queue(where));
      },
      nogil());
  m.def(
      "mark",
      [](Address ptr, Address index, Address bits, int rows, int words, Where where) {
        at_least("rows", rows, 0), at_least("words", words, 0);
        needed("ptr", ptr), needed("bits", bits, int64_t(rows) * words);
        cuda::mark(at<int>(ptr), at<int>(index), at<uint32_t>(bits), rows, words, queue(where));
      },
      nogil());
}

void bind_cuda(py::module_& m) {
  bind_problems<int>(m);
  bind(m);
  bind_sparse(m);
}
