// The Python module pycse.kernels._native. Pointers and sizes in, nothing of torch; the GIL is released in every
// kernel.
#include <cstring>

#include "common/bindings.h"
#include "cpu/dispatch.h"
#include "cpu/pages.h"

namespace py = pybind11;
using namespace pycse;

void bind_cuda(py::module_& m);  // cuda/bindings.cpp

static DType type_of(const char* name, int code, bool f64 = true) {
  in_range(name, code, 0, f64 ? 2 : 1);
  return DType(code);
}

// The panel that a kernel is given: c rows of n similarities.
static Panel panel_of(int64_t B, int64_t n, int dtype, Address S, int64_t ld, int64_t i0, int64_t c, Address f,
                      bool written, int threads) {
  rows_among(i0, "c", c, B);
  matrix("S", S, c, n, ld, written);
  threads_of(threads);
  return {{at(S), ld, i0, c, at(f)}, type_of("dtype", dtype), threads};
}

// Problems of the same rows and keys at several lengths.
static Prefixes given_lengths(const std::vector<const Contrastive*>& lengths) {
  in_range("lengths", int64_t(lengths.size()), 1, kMostLengths);
  Prefixes p;
  for (const Contrastive* one : lengths) {
    needed("lengths", one);
    needed("loss of lengths", one->loss, one->B);
    if (one->B != lengths[0]->B || one->N != lengths[0]->N)
      refuse("lengths", "have the same rows and keys", one->B != lengths[0]->B ? one->B : one->N);
    p.of[p.lengths++] = one;
  }
  return p;
}

static void check_supervised(const Supervised& p, int64_t class_count) {
  at_least("B", p.B, 0);
  at_least("N", p.N, 0);
  numbers("B", p.B, p.N);
  if (p.same && p.N != p.B) refuse("N", "be B where the keys are the rows", p.N);
  in_range("class_count", class_count, 1, p.N + 1);
  needed("ptr", p.ptr), needed("keys", p.keys, p.N), needed("classes", p.classes, p.B);
  in_range("ptr[-1]", p.ptr[class_count], 0, p.N);
  needed("r2", p.r2, p.N), needed("loss", p.loss, p.B);
}

static void check_pattern(const SparsePattern& p) {
  at_least("out", p.out, 0);
  at_least("in", p.in, 0);
  numbers("out", p.out, p.in);
  if (p.block != 1 && p.block != 16 && p.block != 32 && p.block != 64) refuse("block", "be 1, 16, 32 or 64", p.block);
  if (p.out % p.block) refuse("out", "be a multiple of the block", p.out);
  if (p.in % p.block) refuse("in", "be a multiple of the block", p.in);
  needed("ptr", p.ptr), needed("t_ptr", p.t_ptr);
  in_range("ptr[-1]", p.ptr[p.out / p.block], 0, p.out / p.block * (p.in / p.block));
  const int64_t kept = p.ptr[p.out / p.block];
  needed("cols", p.cols, kept), needed("t_rows", p.t_rows, kept);
  if (p.block == 1) needed("plan", p.plan), needed("t_plan", p.t_plan);
}

static void check_dense(const void* kernel, int64_t out, int64_t in, int threads) {
  if (!kernel) throw std::invalid_argument("this instruction set has no dense products: has_dense_products()");
  for (const auto& [name, size] : {std::pair("out", out), std::pair("in", in)})
    if (size < 0 || size % 32) refuse(name, "be a multiple of 32", size);
  if (numbers("out", out / 32, in / 32) > INT32_MAX) refuse("out", "give fewer blocks", out);
  threads_of(threads);
}

PYBIND11_MODULE(_native, m) {
  m.doc() = "pycse's compiled kernels. Use the functions of pycse; these take raw addresses, and see only sizes.";
  using nogil = py::call_guard<py::gil_scoped_release>;

  py::class_<Uniformity>(m, "UniformityProblem");  // of the submodules too
  bind_problems<int64_t>(m);

  m.def(
      "rows",
      [](const Contrastive& p, int dtype, Address S, int64_t ld, int64_t i0, int64_t c, Address f, int threads,
         bool grad, Address T, int64_t ld_T, int dtype_T) {
        check_rows(p);
        if (grad) needed("f", f, c);
        Panel panel = panel_of(p.B, p.N, dtype, S, ld, i0, c, f, grad, threads);
        if (p.guide.given) {
          matrix("T", T, c, p.N, ld_T, false);
          panel.T = at(T), panel.ld_T = ld_T, panel.dtype_T = type_of("dtype_T", dtype_T);
        }
        cpu_kernels().rows(p, panel, grad);
      },
      py::arg("p"), py::arg("dtype"), py::arg("S"), py::arg("ld"), py::arg("i0"), py::arg("c"), py::arg("f"),
      py::arg("threads"), py::arg("grad"), py::arg("T") = 0, py::arg("ld_T") = 0, py::arg("dtype_T") = 0, nogil());
  m.attr("most_lengths") = kMostLengths;
  m.def(
      "prefixes",
      [](const std::vector<const Contrastive*>& lengths, int dtype, Address S, int64_t ld, int64_t step, int64_t i0,
         int64_t c, Address rho, Address t, Address columns, int threads, bool grad, Address T, int64_t ld_T,
         int dtype_T) {
        Prefixes p = given_lengths(lengths);
        p.step = step, p.rho = at(rho), p.t = at(t), p.columns = at(columns);
        for (const Contrastive* one : lengths) check_rows(*one);
        const Contrastive& first = *lengths[0];
        in_range("step", step, (c - 1) * ld + first.N, kMostNumbers);
        needed("rho", p.rho, c);
        if (grad) needed("t", p.t, c), needed("columns", p.columns, first.N);
        Panel panel = panel_of(first.B, first.N, dtype, S, ld, i0, c, 0, grad, threads);
        if (first.guide.given) {
          matrix("T", T, c, first.N, ld_T, false);
          panel.T = at(T), panel.ld_T = ld_T, panel.dtype_T = type_of("dtype_T", dtype_T);
        }
        cpu_kernels().prefixes(p, panel, grad);
      },
      py::arg("lengths"), py::arg("dtype"), py::arg("S"), py::arg("ld"), py::arg("step"), py::arg("i0"), py::arg("c"),
      py::arg("rho"), py::arg("t"), py::arg("columns"), py::arg("threads"), py::arg("grad"), py::arg("T") = 0,
      py::arg("ld_T") = 0, py::arg("dtype_T") = 0, nogil());
  m.def(
      "small_prefixes",
      [](const std::vector<const Contrastive*>& lengths, const std::vector<int64_t>& dims, int dtype, int64_t D,
         Address z1, int64_t ld1, Address z2, int64_t ld2, bool normalize, Address work, Address dz1, Address dz2,
         int threads) {
        const Prefixes p = given_lengths(lengths);
        if (dims.size() != lengths.size()) refuse("dims", "be as many as the lengths", int64_t(dims.size()));
        for (size_t k = 0; k < dims.size(); ++k) in_range("dims", dims[k], k ? dims[k - 1] + 1 : 1, D);
        matrix("z1", z1, p.of[0]->B, D, ld1, false);
        matrix("z2", z2, p.of[0]->N, D, ld2, false);
        needed("work", work);
        threads_of(threads);
        return cpu_kernels().small_prefixes(
            p, dims.data(),
            Small{type_of("dtype", dtype, false), D, ld1, ld2, at(z1), at(z2), normalize, false, at<float>(work),
                  at(dz1), at(dz2), nullptr, threads});
      },
      nogil());
  m.def("small_prefixes_work_size", [](int64_t lengths, int64_t B, int64_t N, int64_t longest) {
    in_range("lengths", lengths, 1, kMostLengths), at_least("B", B, 0), at_least("N", N, 0);
    at_least("longest", longest, 1);
    numbers("B", B, N), numbers("B", B, longest), numbers("N", N, longest);
    return small_prefixes_work_size(lengths, B, N, longest);
  });
  m.def(
      "columns",
      [](const Contrastive& p, int dtype, Address S, int64_t ld, int64_t i0, int64_t c, int threads) {
        check_columns(p);
        cpu_kernels().columns(p, panel_of(p.B, p.N, dtype, S, ld, i0, c, 0, false, threads));
      },
      nogil());
  m.def(
      "symmetric",
      [](const Contrastive& p, int dtype, Address S, int64_t ld, int64_t i0, int64_t c, int threads) {
        check_symmetric(p);
        needed("coef", p.coef, p.B);
        cpu_kernels().symmetric(p, panel_of(p.B, p.N, dtype, S, ld, i0, c, 0, true, threads));
      },
      nogil());
  py::class_<Supervised>(m, "SupervisedProblem");
  m.def(
      "Supervised",
      [](int64_t B, int64_t N, double b, std::optional<double> shift, bool same, bool inside, Address ptr, Address keys,
         Address classes, int64_t class_count, Address r2, Address coef, double coef_all, Address loss,
         Address dlogit) {
        const Supervised p{B,
                           N,
                           b,
                           shift.value_or(0),
                           shift.has_value(),
                           same,
                           inside,
                           at<int64_t>(ptr),
                           at<int64_t>(keys),
                           at<int64_t>(classes),
                           at(r2),
                           at(coef),
                           coef_all,
                           at(loss),
                           at(dlogit)};
        check_supervised(p, class_count);
        return p;
      },
      py::kw_only(), py::arg("B"), py::arg("N"), py::arg("b"), py::arg("shift") = py::none(), py::arg("same"),
      py::arg("inside"), py::arg("ptr"), py::arg("keys"), py::arg("classes"), py::arg("class_count"), py::arg("r2"),
      py::arg("coef") = 0, py::arg("coef_all") = 1, py::arg("loss"), py::arg("dlogit") = 0);
  m.def(
      "supervised",
      [](const Supervised& p, int dtype, Address S, int64_t ld, int64_t i0, int64_t c, Address f, int threads,
         bool grad) {
        if (grad) needed("f", f, c);
        cpu_kernels().supervised(p, panel_of(p.B, p.N, dtype, S, ld, i0, c, f, grad, threads), grad);
      },
      nogil());
  m.def(
      "normalize",
      [](int dtype, Address z, int64_t ld, int64_t n, int64_t D, Address r, Address out, int64_t ld_out, double factor,
         int threads) {
        matrix("z", z, n, D, ld, false);
        if (out) matrix("out", out, n, D, ld_out, true);
        threads_of(threads);
        return cpu_kernels().normalize(type_of("dtype", dtype), at(z), ld, n, D, at(r), at(out), ld_out, factor,
                                       threads);
      },
      nogil());
  m.def(
      "project",
      [](int dtype, int g_dtype, Address z, int64_t ld, Address g, int64_t g_ld, int64_t n, int64_t D, Address r,
         Address f, bool scaled, Address out, int threads) {
        matrix("z", z, n, D, ld, false);
        if (g_ld == 0) matrix("g", g, n, D, D, false);
        else matrix("g", g, D, n, g_ld, true);
        matrix("out", out, n, D, D, true);
        needed("r", r, n);
        threads_of(threads);
        const DType type = type_of("dtype", dtype), g_type = type_of("g_dtype", g_dtype);
        check_gradient_type(dtype, g_dtype);
        cpu_kernels().project(type, g_type, at(z), ld, at(g), g_ld, n, D, at(r), at(f), scaled, at(out), threads);
      },
      nogil());
  m.def(
      "positives",
      [](const Contrastive& p, int dtype, Address z1hat, int64_t ld1, Address z2, int64_t ld2, int64_t D, int64_t i0,
         int64_t n, int threads) {
        rows_among(i0, "n", n, p.B);
        matrix("z1hat", z1hat, n, D, ld1, false);
        matrix("z2", z2, p.N, D, ld2, false);
        needed("r2", p.r2, p.N), needed("s_pos", p.s_pos, p.B);
        threads_of(threads);
        cpu_kernels().positives(p, type_of("dtype", dtype), at(z1hat), ld1, at(z2), ld2, D, i0, n, threads);
      },
      nogil());
  m.def(
      "small",
      [](const Contrastive& p, int dtype, int64_t D, Address z1, int64_t ld1, Address z2, int64_t ld2, bool normalize,
         bool symmetric, Address work, Address dz1, Address dz2, Address total, int threads) {
        matrix("z1", z1, p.B, D, ld1, false);
        matrix("z2", z2, p.N, D, ld2, false);
        needed("work", work);
        if (symmetric && p.N != p.B) refuse("N", "be B in a symmetric loss", p.N);
        threads_of(threads);
        return cpu_kernels().small(p, Small{type_of("dtype", dtype, false), D, ld1, ld2, at(z1), at(z2), normalize,
                                            symmetric, at<float>(work), at(dz1), at(dz2), at<float>(total), threads});
      },
      nogil());
  m.def(
      "distill",
      [](const Distill& d, int dtype, Address S, int64_t ld, int64_t i0, int64_t c, int teacher_dtype, Address teachers,
         int64_t teachers_ld, bool grad, int threads) {
        const Panel panel = panel_of(d.B, d.B, dtype, S, ld, i0, c, 0, grad, threads);
        matrix("teachers", teachers, c, d.B, teachers_ld, false);
        cpu_kernels().distill(d, panel, type_of("teacher_dtype", teacher_dtype), at(teachers), teachers_ld, grad);
      },
      nogil());
  m.def(
      "small_distill",
      [](const Distill& d, int dtype, Address z, int64_t ld, int64_t D, bool normalize,
         const std::vector<std::tuple<int, Address, int64_t, int64_t>>& teachers, const std::vector<double>& weights,
         int logits_dtype, Address logits, int64_t logits_ld, Address work, Address dz, int threads) {
        matrix("z", z, d.B, D, ld, false);
        if (weights.size() != teachers.size()) refuse("weights", "be as many as the teachers", int64_t(weights.size()));
        if (teachers.empty()) matrix("logits", logits, d.B, d.B, logits_ld, false);
        needed("work", work, d.B);
        threads_of(threads);
        std::vector<Vectors> teacher;
        for (const auto& [type, x, stride, width] : teachers) {
          matrix("teachers", x, d.B, width, stride, false);
          teacher.push_back({type_of("teachers' dtype", type, false), at(x), stride, width});
        }
        return cpu_kernels().small_distill(d, {{type_of("dtype", dtype, false), at(z), ld, D},
                                               {type_of("logits_dtype", logits_dtype), at(logits), logits_ld, d.B},
                                               normalize,
                                               int64_t(teacher.size()),
                                               teacher.data(),
                                               weights.data(),
                                               at<float>(work),
                                               at(dz),
                                               threads});
      },
      nogil());
  m.def(
      "sigmoid",
      [](const Sigmoid& p, int dtype, Address S, int64_t ld, int64_t i0, int64_t c, int threads, bool grad) {
        cpu_kernels().sigmoid_rows(p, panel_of(p.B, p.N, dtype, S, ld, i0, c, 0, grad, threads), grad);
      },
      nogil());
  m.def(
      "adapacse",
      [](const Contrastive& p, double m, int dtype, Address S, int64_t ld, int64_t i0, int64_t c, Address f, Address T,
         int64_t ld_T, int dtype_T, int threads, bool grad) {
        check_adapacse(p, m);
        if (grad) needed("f", f, c);
        Panel panel = panel_of(p.B, p.N, dtype, S, ld, i0, c, f, grad, threads);
        matrix("T", T, c, p.N, ld_T, false);
        panel.T = at(T), panel.ld_T = ld_T, panel.dtype_T = type_of("dtype_T", dtype_T);
        cpu_kernels().adapacse(p, m, panel, grad);
      },
      nogil());
  m.def(
      "uniformity",
      [](const Uniformity& p, int dtype, Address S, int64_t ld, int64_t i0, int64_t c, int64_t n, bool grad,
         int threads) {
        at_least("c", c, 0);
        in_range("n", n, c, kMostNumbers);
        in_range("i0", i0, 0, kMostNumbers);
        needed("bias", p.bias, c), needed("sums", p.sums, c);
        cpu_kernels().uniformity(p, panel_of(i0 + c, n, dtype, S, ld, i0, c, 0, grad, threads), n, grad);
      },
      nogil());
  m.def("small_distill_work_size", [](int64_t B, int64_t D, int64_t teachers, int dtype) {
    at_least("B", B, 0), at_least("D", D, 0), at_least("teachers", teachers, 0);
    numbers("B", B, B), numbers("B", B, D), numbers("B", B, teachers);
    return small_distill_work_size(B, D, teachers, type_of("dtype", dtype, false));
  });
  m.def("small_work_size", [](int64_t B, int64_t N, int64_t D, int dtype, bool symmetric) {
    at_least("B", B, 0), at_least("N", N, 0), at_least("D", D, 0);
    numbers("B", B, N), numbers("B", B, D), numbers("N", N, D);
    return small_work_size(B, N, D, type_of("dtype", dtype, false), symmetric);
  });
  py::class_<SparsePattern>(m, "KeptWeights");
  m.def("SparsePattern", [](int64_t out, int64_t in, int block, Address ptr, Address cols, Address t_ptr,
                            Address t_rows, Address plan, Address t_plan, Address packed) {
    const SparsePattern p{out,
                          in,
                          block,
                          at<int32_t>(ptr),
                          at<int32_t>(cols),
                          at<int32_t>(t_ptr),
                          at<int32_t>(t_rows),
                          at<int32_t>(plan),
                          at<int32_t>(t_plan),
                          at(packed)};
    check_pattern(p);
    return p;
  });
  m.attr("SPARSE_CHUNK") = kSparseChunk;
  m.attr("SPARSE_AT_STEP") = kAtStep;
  m.def(
      "sparse_product",
      [](const SparsePattern& p, int dtype, Address x, int64_t ldx, Address w, int64_t ldw, Address bias, Address y,
         int64_t n, bool transposed, int threads) {
        matrix("x", x, n, transposed ? p.out : p.in, ldx, false);
        matrix("w", w, p.out, p.in, ldw, false);
        matrix("y", y, n, transposed ? p.in : p.out, transposed ? p.in : p.out, true);
        threads_of(threads);
        cpu_kernels().sparse_product(p, type_of("dtype", dtype), at(x), ldx, at(w), ldw, at(bias), at(y), n, transposed,
                                     threads);
      },
      nogil());
  m.def(
      "sparse_outer",
      [](const SparsePattern& p, int dtype, Address dy, int64_t ldy, Address x, int64_t ldx, Address dw, int64_t n,
         int threads) {
        matrix("dy", dy, n, p.out, ldy, false);
        matrix("x", x, n, p.in, ldx, false);
        matrix("dw", dw, p.out, p.in, p.in, true);
        threads_of(threads);
        cpu_kernels().sparse_outer(p, type_of("dtype", dtype), at(dy), ldy, at(x), ldx, at(dw), n, threads);
      },
      nogil());
  m.def(
      "sparse_pack",
      [](const SparsePattern& p, int dtype, Address w, int64_t ldw, Address packed, int threads) {
        if (p.block != 1) refuse("block", "be 1: only single weights are packed", p.block);
        matrix("w", w, p.out, p.in, ldw, false);
        needed("packed", packed, p.ptr[p.out]);
        threads_of(threads);
        cpu_kernels().sparse_pack(p, type_of("dtype", dtype), at(w), ldw, at(packed), threads);
      },
      nogil());
  // A few hundred numbers of a tensor, spread over it: another value shows that somebody wrote to it.
  m.def("fingerprint", [](Address begin, size_t bytes) {
    needed("begin", begin, bytes >= sizeof(uint64_t));
    in_range("bytes", int64_t(bytes), 0, kMostNumbers);
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
        matrix("w", w, out, in, ldw, false);
        matrix("result", result, out, in, in, true);
        needed("bits", bits, out > 0 && in > 0);
        threads_of(threads);
        cpu_kernels().mask_weight(type_of("dtype", dtype), at(w), ldw, at<int32_t>(bits), out, in, at(result), threads);
      },
      nogil());
  m.def("has_dense_products", [] { return cpu_kernels().dense_product != nullptr; });
  m.def(
      "dense_product",
      [](Address x, int64_t ldx, Address w, int64_t ldw, int64_t out, int64_t in, Address y, int64_t ldy, int64_t n,
         bool transposed, bool add, int threads) {
        check_dense(reinterpret_cast<const void*>(cpu_kernels().dense_product), out, in, threads);
        matrix("x", x, n, transposed ? out : in, ldx, false);
        matrix("w", w, out, in, ldw, false);
        matrix("y", y, n, transposed ? in : out, ldy, true);
        cpu_kernels().dense_product(at<float>(x), ldx, at<float>(w), ldw, out, in, at<float>(y), ldy, n, transposed,
                                    add, threads);
      },
      nogil());
  m.def(
      "dense_outer",
      [](Address dy, int64_t ldy, Address x, int64_t ldx, int64_t out, int64_t in, Address dw, int64_t n, bool add,
         int threads) {
        check_dense(reinterpret_cast<const void*>(cpu_kernels().dense_outer), out, in, threads);
        matrix("dy", dy, n, out, ldy, false);
        matrix("x", x, n, in, ldx, false);
        matrix("dw", dw, out, in, in, true);
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
#ifdef PYCSE_WITH_CUDA
  py::module_ cuda = m.def_submodule("cuda", "The CUDA kernels.");
  bind_cuda(cuda);
#endif
}
