// Checks of adapacse.h: negatives turned towards their row by an angle that a teacher's similarity makes.
//
//   c = cos(theta - m (1 - alpha)) where theta > m, else s     L_i = log(1 + sum_neg exp((c_ij - s_i,pos) / tau))
//   G_ij = dL_i/ds_ij coef_i r_j, c' = cos(phi) - s sin(phi) / sin(theta)
#include "check.h"

namespace checks {
namespace {

struct Case {
  int64_t B, N;
  double m;
  bool fixed = true, positives = false, ids = false;
  std::string name() const {
    return std::to_string(B) + "x" + std::to_string(N) + " m " + std::to_string(m) + (fixed ? " shift" : "") +
           (positives ? " positives" : "") + (ids ? " ids" : "");
  }
};

// One row, one key; no margin, and the largest; ragged tails, blocks of 256 keys that end inside and after the last.
const Case kCases[] = {
    {1, 1, 0.3},
    {1, 17, 0, false, true},
    {3, 16, 1.5707963, true, false, true},
    {7, 31, 0.7, false, true},
    {5, 255, 0.1, true, true},
    {9, 271, 1.2, false, false, true},
    {4, 521, 0.02, true, true},
};

template <class T, class U>
void angular_case(const Kernels& k, const Case& c, bool grad, bool params) {
  using A = acc<T>;
  const double tau = 0.05, edge = std::cos(c.m);
  Random random(c.B * 1000 + c.N);
  Matrix<T> S(c.B, c.N, 3);
  Matrix<U> teacher(c.B, c.N, 5);  // on a grid, which every type holds
  Matrix<A> r2(c.N, 1), coef(c.B, 1), loss(c.B, 1), f(c.B, 1), dlogit(c.B, 1);
  Matrix<int64_t> positives(c.B, 1), query_ids(c.B, 1), key_ids(c.N, 1);
  r2.set([&](int64_t, int64_t) { return random.below(2) ? 1 : 0.5; });  // s is on the grid of S too
  coef.set([&](int64_t, int64_t) { return random.normal(); });
  S.set([&](int64_t, int64_t j) {  // far from the jump at cos(m), and from -1, where the slope is steepest
    double s;
    do s = double(random.below(121) - 60) / 64;
    while (std::fabs(s - edge) < 1e-3);
    return s / double(r2(j));
  });
  teacher.set([&](int64_t, int64_t) { return double(random.below(161) - 80) / 64; });  // some beyond [-1, 1]
  for (int64_t i = 0; i < c.B; ++i) positives(i) = c.positives ? random.below(c.N) : i, query_ids(i) = random.below(3);
  for (int64_t j = 0; j < c.N; ++j) key_ids(j) = random.below(3);

  Matrix<double> D(c.B, c.N), want(c.B, 1), want_b(c.B, 1);
  for (int64_t i = 0; i < c.B; ++i) {
    const int64_t pos = positives(i);
    const double s_pos = S.value(i, pos) * double(r2(pos));
    std::vector<double> e(c.N, 0.0), slope(c.N, 1.0);
    double sum = 0, turned_sum = 0;
    for (int64_t j = 0; j < c.N; ++j) {
      if (j == pos || (c.ids && query_ids(i) == key_ids(j))) continue;
      const double s = S.value(i, j) * double(r2(j)), theta = std::acos(s);
      const double alpha = std::min(1.0, std::max(-1.0, teacher.value(i, j))), phi = c.m * (1 - alpha);
      const double turned = theta > c.m ? std::cos(theta - phi) : s;
      if (theta > c.m) slope[j] = std::cos(phi) - s * std::sin(phi) / std::sin(theta);
      sum += e[j] = std::exp((turned - s_pos) / tau);
      turned_sum += e[j] * turned;
    }
    want(i) = std::log1p(sum);
    want_b(i) = double(coef(i)) * (turned_sum - sum * s_pos) / (1 + sum);
    for (int64_t j = 0; j < c.N; ++j)
      D(i, j) = double(coef(i)) * (j == pos ? -sum : e[j] * slope[j]) / (1 + sum) / tau * double(r2(j));
  }

  pycse::Contrastive p;
  p.B = c.B, p.N = c.N, p.r2 = r2.at, p.coef = coef.at, p.loss = loss.at;
  if (params) p.dlogit = dlogit.at;
  p.logit = {{0, 1 / tau, 0, 0, 1 / tau, 1 / tau, 0, 0}};
  p.fixed_shift = c.fixed;
  if (c.fixed) p.shift = 1 / tau;
  if (c.positives) p.positives = positives.at;
  if (c.ids) p.query_ids = query_ids.at, p.key_ids = key_ids.at;
  const int64_t step = c.B > 4 ? (c.B + 1) / 2 : c.B;
  for (int64_t i0 = 0; i0 < c.B; i0 += step) {
    pycse::Panel panel = {{&S(i0), S.ld, i0, std::min(step, c.B - i0)}, kType<T>, kThreads};
    panel.T = &teacher(i0), panel.ld_T = teacher.ld, panel.dtype_T = kType<U>;
    if (grad) panel.f = f.at + i0;
    k.adapacse(p, c.m, panel, grad);
  }
  close("loss", loss, [&](int64_t i, int64_t) { return want(i); }, kBand<A>, 1);
  expect(teacher.gaps_untouched(), "between the rows of T");
  if (params) close("db", dlogit, [&](int64_t i, int64_t) { return want_b(i); }, kBand<A>, 1e-2);
  if (!grad) return;
  Matrix<double> G(c.B, c.N);  // with the rows' factors
  G.set([&](int64_t i, int64_t j) { return S.value(i, j) * double(f(i)); });
  close("G", G, [&](int64_t i, int64_t j) { return D(i, j); }, kBand<T>, 1e-3);
}

template <class T, class U>
void angular_of(const Kernels& k, const char* types) {
  for (const Case& c : kCases)
    for (int what = 0; what < 3; ++what) {
      now = std::string("adapacse ") + types + " " + c.name() + (what ? " grad" : "") + (what > 1 ? " db" : "");
      angular_case<T, U>(k, c, what > 0, what > 1);
    }
}

}  // namespace

void adapacse(const Kernels& k) {
  angular_of<float, float>(k, "fp32 by fp32");
  angular_of<float, bf16>(k, "fp32 by bf16");
  angular_of<bf16, float>(k, "bf16 by fp32");
  angular_of<double, double>(k, "fp64 by fp64");
  angular_of<double, float>(k, "fp64 by fp32");
}

}  // namespace checks
