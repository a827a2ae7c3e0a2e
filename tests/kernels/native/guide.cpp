// Checks of rows.h with a guide: keys whose similarity T_ij by another model is above the row's bound are no negatives.
//
//   l = s / tau   L_i = log(1 + sum_neg exp(l_ij - l_i,pos))   D_ij = coef_i dL_i/ds_ij
#include "check.h"

namespace checks {
namespace {

using pycse::ExcludeBy;

struct Case {
  int64_t B, N;
  bool fixed = true, positives = false, ids = false;
  ExcludeBy by = ExcludeBy::absolute;
  double above = 0;  // where similarities equal their bound
  std::string name() const {
    return std::to_string(B) + "x" + std::to_string(N) + (fixed ? " shift" : "") + (positives ? " positives" : "") +
           (ids ? " ids" : "") + " by " + std::to_string(int(by)) + " " + std::to_string(above);
  }
};

// One row, one key; no key left (a bound below all); ragged tails, blocks of 256 keys that end inside and after the last.
const Case kCases[] = {
    {1, 1},
    {1, 17, false, true, false, ExcludeBy::relative, -0.2},
    {3, 16, true, false, true, ExcludeBy::constant, 0.25},
    {7, 31, false, true, false, ExcludeBy::absolute, -3},
    {5, 255, true, true, false, ExcludeBy::relative, 0.3},
    {9, 271, false, false, true},
    {4, 521, true, true, false, ExcludeBy::constant, 0.1},
};

template <class T, class U>
void guide_case(const Kernels& k, const Case& c, bool grad) {
  using A = acc<T>;
  const double tau = 0.05;
  Random random(c.B * 1000 + c.N);
  Matrix<T> S(c.B, c.N, 3);
  Matrix<U> guide(c.B, c.N, 5);  // on a grid, which every type holds
  Matrix<A> r2(c.N, 1), coef(c.B, 1), loss(c.B, 1), f(c.B, 1);
  Matrix<int64_t> positives(c.B, 1), query_ids(c.B, 1), key_ids(c.N, 1);
  r2.set([&](int64_t, int64_t) { return 0.5 + random.uniform(); });
  coef.set([&](int64_t, int64_t) { return random.normal(); });
  S.set([&](int64_t, int64_t j) { return std::tanh(random.normal()) / double(r2(j)); });
  guide.set([&](int64_t, int64_t) { return double(random.below(129) - 64) / 64; });
  for (int64_t i = 0; i < c.B; ++i) positives(i) = c.positives ? random.below(c.N) : i, query_ids(i) = random.below(3);
  for (int64_t j = 0; j < c.N; ++j) key_ids(j) = random.below(3);

  Matrix<double> D(c.B, c.N), want(c.B, 1);
  for (int64_t i = 0; i < c.B; ++i) {
    const int64_t pos = positives(i);
    const double at = guide.value(i, pos), l_pos = S.value(i, pos) * double(r2(pos)) / tau;
    const double bound = c.by == ExcludeBy::constant   ? c.above
                         : c.by == ExcludeBy::relative ? at + c.above * std::fabs(at)
                                                       : at + c.above;
    std::vector<double> e(c.N, 0.0);
    double sum = 0;
    for (int64_t j = 0; j < c.N; ++j) {
      if (j == pos || guide.value(i, j) > bound || (c.ids && query_ids(i) == key_ids(j))) continue;
      sum += e[j] = std::exp(S.value(i, j) * double(r2(j)) / tau - l_pos);
    }
    want(i) = std::log1p(sum);
    for (int64_t j = 0; j < c.N; ++j)
      D(i, j) = double(coef(i)) * (j == pos ? -sum : e[j]) / (1 + sum) / tau * double(r2(j));
  }

  pycse::Contrastive p;
  p.B = c.B, p.N = c.N, p.r2 = r2.at, p.coef = coef.at, p.loss = loss.at;
  p.logit = {{0, 1 / tau, 0, 0, 1 / tau, 1 / tau, 0, 0}};
  p.fixed_shift = c.fixed;
  if (c.fixed) p.shift = 1 / tau;
  p.guide = {true, c.by, c.above, nullptr};
  if (c.positives) p.positives = positives.at;
  if (c.ids) p.query_ids = query_ids.at, p.key_ids = key_ids.at;
  const int64_t step = c.B > 4 ? (c.B + 1) / 2 : c.B;
  for (int64_t i0 = 0; i0 < c.B; i0 += step) {
    pycse::Panel panel = {{&S(i0), S.ld, i0, std::min(step, c.B - i0)}, kType<T>, kThreads};
    panel.T = &guide(i0), panel.ld_T = guide.ld, panel.dtype_T = kType<U>;
    if (grad) panel.f = f.at + i0;
    k.rows(p, panel, grad);
  }
  close("loss", loss, [&](int64_t i, int64_t) { return want(i); }, kBand<A>, 1);
  expect(guide.gaps_untouched(), "between the rows of T");
  if (!grad) return;
  Matrix<double> G(c.B, c.N);  // with the rows' factors
  G.set([&](int64_t i, int64_t j) { return S.value(i, j) * double(f(i)); });
  close("G", G, [&](int64_t i, int64_t j) { return D(i, j); }, kBand<T>, 1e-3);
}

template <class T, class U>
void guide_of(const Kernels& k, const char* types) {
  for (const Case& c : kCases)
    for (bool grad : {false, true}) {
      now = std::string("guide ") + types + " " + c.name() + (grad ? " grad" : "");
      guide_case<T, U>(k, c, grad);
    }
}

}  // namespace

void guide(const Kernels& k) {
  guide_of<float, float>(k, "fp32 by fp32");
  guide_of<float, bf16>(k, "fp32 by bf16");
  guide_of<float, double>(k, "fp32 by fp64");
  guide_of<bf16, float>(k, "bf16 by fp32");
  guide_of<bf16, bf16>(k, "bf16 by bf16");
  guide_of<bf16, double>(k, "bf16 by fp64");
  guide_of<double, float>(k, "fp64 by fp32");
  guide_of<double, bf16>(k, "fp64 by bf16");
  guide_of<double, double>(k, "fp64 by fp64");
}

}  // namespace checks
