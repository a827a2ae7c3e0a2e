// Problems as Python fills them, for the processor (64-bit indices) and for a GPU or its emulation (32-bit). Arguments go
// by name; addresses are numbers, 0 for none.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "arguments.h"
#include "problem.h"

namespace pycse {

template <class T = void>
static T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Problems are made by functions and not by constructors: pybind11 registers what a constructor has made outside its
// try block, and a failed allocation would unwind through the interpreter. module_local: the tests' module, beside this
// one in their process, has the same types.
template <class Index>
void bind_problems(pybind11::module_& m) {
  namespace py = pybind11;
  using Contrastive = ContrastiveOf<Index>;
  using Distill = DistillOf<Index>;

  py::class_<Contrastive>(m, "ContrastiveProblem", py::module_local());
  m.def(
      "Contrastive",
      [](Index B, Index N, const std::array<double, kCoefficients>& logit, Address logit_at,
         std::optional<double> shift, std::optional<int> exclude_by, double exclude_above, Address exclude_each,
         std::optional<int> guide_by, double guide_above, Address r2, Address s_pos, Address positives,
         Address query_ids, Address key_ids, Address coef, double coef_all, Address loss, Address dlogit, Address lpos,
         Address lneg, Address column_max, Address column_sum, Address lneg_column, Address lse_column) {
        Contrastive p;
        p.B = B, p.N = N, p.logit.at = at(logit_at);
        for (int k = 0; k < kCoefficients; ++k) p.logit.value[k] = logit[k];
        p.fixed_shift = shift.has_value(), p.shift = shift.value_or(0);
        if (exclude_by) {
          in_range("exclude_by", *exclude_by, 0, 2);
          p.exclude = {true, ExcludeBy(*exclude_by), exclude_above, at(exclude_each)};
        }
        if (guide_by) {
          in_range("guide_by", *guide_by, 0, 2);
          p.guide = {true, ExcludeBy(*guide_by), guide_above, nullptr};
        }
        p.r2 = at(r2), p.s_pos = at(s_pos), p.positives = at<int64_t>(positives);
        p.query_ids = at<int64_t>(query_ids), p.key_ids = at<int64_t>(key_ids);
        p.coef = at(coef), p.coef_all = coef_all, p.loss = at(loss), p.dlogit = at(dlogit);
        p.lpos = at(lpos), p.lneg = at(lneg), p.column_max = at(column_max), p.column_sum = at(column_sum);
        p.lneg_column = at(lneg_column), p.lse_column = at(lse_column);
        check_contrastive(p);
        return p;
      },
      py::kw_only(), py::arg("B"), py::arg("N"), py::arg("logit"), py::arg("logit_at") = 0,
      py::arg("shift") = py::none(), py::arg("exclude_by") = py::none(), py::arg("exclude_above") = 0,
      py::arg("exclude_each") = 0, py::arg("guide_by") = py::none(), py::arg("guide_above") = 0, py::arg("r2") = 0,
      py::arg("s_pos") = 0, py::arg("positives") = 0, py::arg("query_ids") = 0, py::arg("key_ids") = 0,
      py::arg("coef") = 0, py::arg("coef_all") = 1, py::arg("loss") = 0, py::arg("dlogit") = 0, py::arg("lpos") = 0,
      py::arg("lneg") = 0, py::arg("column_max") = 0, py::arg("column_sum") = 0, py::arg("lneg_column") = 0,
      py::arg("lse_column") = 0);

  py::class_<Distill>(m, "DistillProblem", py::module_local());
  m.def(
      "Distill",
      [](Index B, double student, double teacher, double group, int divergence, int kind, double value, int64_t end,
         bool sample, uint64_t seed, Address seed_at, Address coef, double coef_all, Address loss) {
        Distill d;
        d.B = B, d.inv_student = 1 / student, d.inv_teacher = 1 / teacher, d.inv_group = 1 / group;
        d.divergence = Divergence(divergence), d.cut = {GroupKind(kind), value, end}, d.sample = sample;
        d.seed = seed, d.seed_at = at<uint64_t>(seed_at), d.coef = at(coef), d.coef_all = coef_all, d.loss = at(loss);
        check_distill(d);
        return d;
      },
      py::kw_only(), py::arg("B"), py::arg("student_temperature"), py::arg("teacher_temperature"),
      py::arg("group_temperature"), py::arg("divergence"), py::arg("grouping"), py::arg("group_value"),
      py::arg("group_end"), py::arg("sample"), py::arg("seed") = 0, py::arg("seed_at") = 0, py::arg("coef") = 0,
      py::arg("coef_all") = 1, py::arg("loss") = 0);

  py::class_<SigmoidOf<Index>>(m, "SigmoidProblem", py::module_local());
  m.def(
      "Sigmoid",
      [](Index B, Index N, double scale, double bias, Address r2, Address s_pos, Address positives, Address query_ids,
         Address key_ids, Address coef, double coef_all, Address loss, Address dlogit) {
        SigmoidOf<Index> p;
        p.B = B, p.N = N, p.scale = scale, p.bias = bias, p.r2 = at(r2), p.s_pos = at(s_pos);
        p.positives = at<int64_t>(positives), p.query_ids = at<int64_t>(query_ids), p.key_ids = at<int64_t>(key_ids);
        p.coef = at(coef), p.coef_all = coef_all, p.loss = at(loss), p.dlogit = at(dlogit);
        check_sigmoid(p);
        return p;
      },
      py::kw_only(), py::arg("B"), py::arg("N"), py::arg("scale"), py::arg("bias"), py::arg("r2") = 0,
      py::arg("s_pos") = 0, py::arg("positives") = 0, py::arg("query_ids") = 0, py::arg("key_ids") = 0,
      py::arg("coef") = 0, py::arg("coef_all") = 1, py::arg("loss") = 0, py::arg("dlogit") = 0);

  m.def(
      "Uniformity", [](double u, Address bias, Address sums) { return Uniformity{u, at(bias), at(sums)}; },
      py::arg("u"), py::arg("bias"), py::arg("sums"));
}

}  // namespace pycse
