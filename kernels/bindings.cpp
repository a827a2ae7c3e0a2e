// The Python module pycse.kernels._native. Pointers and sizes in, nothing of torch; the GIL is released in every kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/pages.h"

namespace py = pybind11;
using namespace pycse;
using Address = std::uintptr_t;  // a tensor's data_ptr(), 0 for none

template <class T = void>
static T* at(Address address) { return reinterpret_cast<T*>(address); }

void bind_cuda(py::module_& m);  // cuda/bindings.cpp

PYBIND11_MODULE(_native, m) {
  m.doc() = "pycse's compiled kernels. Use the functions of pycse; these take raw addresses and check nothing.";
  using nogil = py::call_guard<py::gil_scoped_release>;

  py::class_<Contrastive>(m, "Contrastive")
      .def(py::init([](int64_t B, int64_t N, bool focal, double tau, double m, std::optional<double> shift,
                       double hard_weight, std::optional<double> exclude_above, Address r2, Address s_pos, Address positives,
                       Address query_ids, Address key_ids, Address coef, double coef_all, Address loss, Address dtau,
                       Address dm) {
             Contrastive p;
             p.B = B, p.N = N, p.focal = focal, p.inv_tau = 1 / tau, p.m = m;
             p.fixed_shift = shift.has_value(), p.shift = shift.value_or(0);
             p.hard_weight = hard_weight;
             p.exclude = exclude_above.has_value(), p.exclude_above = exclude_above.value_or(0);
             p.r2 = at(r2), p.s_pos = at(s_pos), p.positives = at<int64_t>(positives);
             p.query_ids = at<int64_t>(query_ids), p.key_ids = at<int64_t>(key_ids);
             p.coef = at(coef), p.coef_all = coef_all;
             p.loss = at(loss), p.dtau = at(dtau), p.dm = at(dm);
             return p;
           }),
           py::arg("B"), py::arg("N"), py::arg("focal"), py::arg("tau"), py::arg("m"), py::arg("shift"),
           py::arg("hard_weight"), py::arg("exclude_above"), py::arg("r2") = 0, py::arg("s_pos") = 0, py::arg("positives") = 0,
           py::arg("query_ids") = 0, py::arg("key_ids") = 0, py::arg("coef") = 0, py::arg("coef_all") = 1,
           py::arg("loss") = 0, py::arg("dtau") = 0, py::arg("dm") = 0)
      .def(
          "symmetric_state",
          [](Contrastive& p, Address lpos, Address lneg, Address column_max, Address column_sum,
             Address lneg_column, Address lse_column) {
            p.lpos = at<double>(lpos), p.lneg = at<double>(lneg);
            p.column_max = at<double>(column_max), p.column_sum = at<double>(column_sum);
            p.lneg_column = at<double>(lneg_column), p.lse_column = at(lse_column);
          },
          py::arg("lpos"), py::arg("lneg"), py::arg("column_max"), py::arg("column_sum"),
          py::arg("lneg_column"), py::arg("lse_column"));

  auto panel = [](int dtype, Address S, int64_t ld, int64_t i0, int64_t c, Address f, int threads) {
    return Panel{DType(dtype), at(S), ld, i0, c, at(f), threads};
  };
  m.def(
      "rows",
      [panel](const Contrastive& p, int dtype, Address S, int64_t ld, int64_t i0, int64_t c, Address f,
              int threads, bool grad) {
        cpu_kernels().rows(p, panel(dtype, S, ld, i0, c, f, threads), grad);
      },
      nogil());
  m.def(
      "columns",
      [panel](const Contrastive& p, int dtype, Address S, int64_t ld, int64_t i0, int64_t c, int threads) {
        cpu_kernels().columns(p, panel(dtype, S, ld, i0, c, 0, threads));
      },
      nogil());
  m.def(
      "symmetric",
      [panel](const Contrastive& p, int dtype, Address S, int64_t ld, int64_t i0, int64_t c, int threads) {
        cpu_kernels().symmetric(p, panel(dtype, S, ld, i0, c, 0, threads));
      },
      nogil());
  m.def(
      "normalize",
      [](int dtype, Address z, int64_t ld, int64_t n, int64_t D, Address r, Address out, int64_t ld_out,
         double factor, int threads) {
        cpu_kernels().normalize(DType(dtype), at(z), ld, n, D, at(r), at(out), ld_out, factor, threads);
      },
      nogil());
  m.def(
      "project",
      [](int dtype, int g_dtype, Address z, int64_t ld, Address g, int64_t g_ld, int64_t n, int64_t D, Address r,
         Address f, bool scaled, Address out, int threads) {
        cpu_kernels().project(DType(dtype), DType(g_dtype), at(z), ld, at(g), g_ld, n, D, at(r), at(f), scaled, at(out),
                              threads);
      },
      nogil());
  m.def(
      "positives",
      [](const Contrastive& p, int dtype, Address z1hat, int64_t ld1, Address z2, int64_t ld2, int64_t D, int64_t i0,
         int64_t n, int threads) {
        cpu_kernels().positives(p, DType(dtype), at(z1hat), ld1, at(z2), ld2, D, i0, n, threads);
      },
      nogil());
  m.def(
      "small",
      [](const Contrastive& p, int dtype, int64_t D, Address z1, int64_t ld1, Address z2, int64_t ld2, bool normalize,
         bool symmetric, Address work, Address dz1, Address dz2, Address total, int threads) {
        return cpu_kernels().small(p, Small{DType(dtype), D, ld1, ld2, at(z1), at(z2), normalize, symmetric, at<float>(work),
                                     at(dz1), at(dz2), at<float>(total), threads});
      },
      nogil());
  py::class_<Distill>(m, "Distill")
      .def(py::init([](int64_t B, double student, double teacher, double group, int divergence, int kind, double value,
                       int64_t end, bool sample, uint64_t seed, Address coef, double coef_all, Address loss) {
             return Distill{B, 1 / student, 1 / teacher, 1 / group, Divergence(divergence), {GroupKind(kind), value, end},
                            sample, seed, at(coef), coef_all, at(loss)};
           }),
           py::arg("B"), py::arg("student_temperature"), py::arg("teacher_temperature"), py::arg("group_temperature"),
           py::arg("divergence"), py::arg("grouping"), py::arg("group_value"), py::arg("group_end"), py::arg("sample"),
           py::arg("seed"), py::arg("coef"), py::arg("coef_all"), py::arg("loss"));
  m.def(
      "distill",
      [panel](const Distill& d, int dtype, Address S, int64_t ld, int64_t i0, int64_t c, int teacher_dtype,
              Address teachers, int64_t teachers_ld, bool grad, int threads) {
        cpu_kernels().distill(d, panel(dtype, S, ld, i0, c, 0, threads), DType(teacher_dtype), at(teachers), teachers_ld,
                              grad);
      },
      nogil());
  m.def(
      "small_distill",
      [](const Distill& d, int dtype, Address z, int64_t ld, int64_t D, bool normalize,
         const std::vector<std::tuple<int, Address, int64_t, int64_t>>& teachers, const std::vector<double>& weights,
         int logits_dtype, Address logits, int64_t logits_ld, Address work, Address dz, int threads) {
        std::vector<Vectors> teacher;
        for (const auto& [type, x, stride, width] : teachers) teacher.push_back({DType(type), at(x), stride, width});
        return cpu_kernels().small_distill(
            d, {{DType(dtype), at(z), ld, D}, {DType(logits_dtype), at(logits), logits_ld, d.B}, normalize,
                int64_t(teacher.size()), teacher.data(), weights.data(), at<float>(work), at(dz), threads});
      },
      nogil());
  py::class_<Uniformity>(m, "Uniformity").def(py::init([](double u, Address bias, Address sums) {
    return Uniformity{u, at(bias), at(sums)};
  }));
  m.def(
      "uniformity",
      [panel](const Uniformity& p, int dtype, Address S, int64_t ld, int64_t i0, int64_t c, int64_t n, bool grad,
              int threads) {
        cpu_kernels().uniformity(p, panel(dtype, S, ld, i0, c, 0, threads), n, grad);
      },
      nogil());
  m.def("small_distill_work_size", [](int64_t B, int64_t D, int64_t teachers, int dtype) {
    return small_distill_work_size(B, D, teachers, DType(dtype));
  });
  m.def("small_work_size", [](int64_t B, int64_t N, int64_t D, int dtype, bool symmetric) {
    return small_work_size(B, N, D, DType(dtype), symmetric);
  });
  py::class_<SparsePattern>(m, "SparsePattern")
      .def(py::init([](int64_t out, int64_t in, int block, Address ptr, Address cols, Address t_ptr, Address t_rows,
                       Address plan, Address t_plan, Address packed) {
        return SparsePattern{out, in, block, at<int32_t>(ptr), at<int32_t>(cols), at<int32_t>(t_ptr), at<int32_t>(t_rows),
                             at<int32_t>(plan), at<int32_t>(t_plan), at(packed)};
      }));
  m.attr("SPARSE_CHUNK") = kSparseChunk;
  m.attr("SPARSE_AT_STEP") = kAtStep;
  m.def(
      "sparse_product",
      [](const SparsePattern& p, int dtype, Address x, int64_t ldx, Address w, int64_t ldw, Address bias, Address y, int64_t n,
         bool transposed, int threads) {
        cpu_kernels().sparse_product(p, DType(dtype), at(x), ldx, at(w), ldw, at(bias), at(y), n, transposed, threads);
      },
      nogil());
  m.def(
      "sparse_outer",
      [](const SparsePattern& p, int dtype, Address dy, int64_t ldy, Address x, int64_t ldx, Address dw, int64_t n,
         int threads) { cpu_kernels().sparse_outer(p, DType(dtype), at(dy), ldy, at(x), ldx, at(dw), n, threads); },
      nogil());
  m.def(
      "sparse_pack",
      [](const SparsePattern& p, int dtype, Address w, int64_t ldw, Address packed, int threads) {
        cpu_kernels().sparse_pack(p, DType(dtype), at(w), ldw, at(packed), threads);
      },
      nogil());
  // A few hundred numbers of a tensor, spread over it: another value shows that somebody wrote to it.
  m.def("fingerprint", [](Address begin, size_t bytes) {
    uint64_t hash = 14695981039346656037u, word = 0;  // FNV-1a, by words
    const size_t words = bytes / sizeof word, step = (words / 512) | 1;  // odd: not one column of a weight
    for (size_t i = 0; i < words; i += step) {
      std::memcpy(&word, at<char>(begin) + i * sizeof word, sizeof word);
      hash = (hash ^ word) * 1099511628211u;
    }
    return hash;
  });
  m.def(
      "mask_weight",
      [](int dtype, Address w, int64_t ldw, Address bits, int64_t out, int64_t in, Address result, int threads) {
        cpu_kernels().mask_weight(DType(dtype), at(w), ldw, at<int32_t>(bits), out, in, at(result), threads);
      },
      nogil());
  m.def("has_dense_products", [] { return cpu_kernels().dense_product != nullptr; });
  m.def(
      "dense_product",
      [](Address x, int64_t ldx, Address w, int64_t ldw, int64_t out, int64_t in, Address y, int64_t ldy, int64_t n, bool transposed,
         bool add, int threads) {
        cpu_kernels().dense_product(at<float>(x), ldx, at<float>(w), ldw, out, in, at<float>(y), ldy, n, transposed, add, threads);
      },
      nogil());
  m.def(
      "dense_outer",
      [](Address dy, int64_t ldy, Address x, int64_t ldx, int64_t out, int64_t in, Address dw, int64_t n, bool add, int threads) {
        cpu_kernels().dense_outer(at<float>(dy), ldy, at<float>(x), ldx, out, in, at<float>(dw), n, add, threads);
      },
      nogil());
  m.def("prefer_huge_pages", &prefer_huge_pages);
#ifdef PYCSE_WITH_CUDA
  m.def("cuda_compiled", [] { return true; });
#else
  m.def("cuda_compiled", [] { return false; });
#endif
#ifdef _OPENMP
  m.attr("OPENMP") = true;
#else
  m.attr("OPENMP") = false;
#endif
  m.def("cpu_isa", [] { return std::string(cpu_kernels().isa); });
  m.def("cpu_instruction_sets", &cpu_instruction_sets);
  bind_cuda(m);
}
