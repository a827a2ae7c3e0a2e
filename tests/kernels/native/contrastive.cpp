// Checks of norms.h, rows.h, symmetric.h, small.h and uniformity.h.
//
//   s_ij cosine   l_ij by its coefficients (common/logit.h)   L_i = log(1 + sum_neg exp(l_ij - l_i,pos))
//   D_ij = dL/ds_ij of L = sum_i coef_i L_i; of a symmetric loss the mean of rows and columns
#include "check.h"

namespace checks {
namespace {

using Values = std::vector<double>;

struct Case {
  int64_t B, N, D;
  bool focal = true, fixed = true, ids = false, exclude = false, positives = false, symmetric = false, params = false;
  double hard = 0, margin = 0, hardness = 0, hard_hardness = 0;  // hard_: of own hard negatives, more
  pycse::ExcludeBy by = pycse::ExcludeBy::absolute;
  bool each = false;  // a bound for each row
  double tau = 0.07, m = 0.3, above = 0.05;
  std::string name() const {
    return std::to_string(B) + "x" + std::to_string(N) + "x" + std::to_string(D) + (focal ? " focal" : " infonce") +
           (fixed ? " shift" : "") + (ids ? " ids" : "") + (exclude ? " exclude" : "") +
           (positives ? " positives" : "") + (symmetric ? " symmetric" : "") + (hard != 0 ? " hard" : "") +
           (margin != 0 ? " margin" : "") + (hardness != 0 ? " hardness" : "") + (hard_hardness != 0 ? " of own" : "") +
           (exclude ? " by " + std::to_string(int(by)) : "") + (each ? " each" : "") + (params ? " params" : "");
  }
};

// Both directions, ragged tails of every vector length, blocks of 256 keys that end inside and after the last.
const Case kCases[] = {
    {1, 1, 1},
    {2, 3, 5, false},
    {7, 7, 33, true, false, true, true},
    {5, 21, 17, true, true, false, false, true, false, true},
    {13, 39, 48, true, false, false, false, false, false, true, 1.5},
    {6, 271, 19, false, false, true, true, true},
    {3, 521, 31, true, true, false, true, false, false, false, 0.7},
    {9, 9, 20, true, true, false, false, false, true, true},
    {37, 37, 65, true, false, true, true, false, true, true},
    {33, 33, 7, false, true, true, false, false, true},
    {1, 1, 3, true, false, false, false, false, true},
    {259, 259, 12, true, true, false, true, false, true},
    {5, 15, 9, false, true, false, false, false, false, true, 0.5, 0.2, 3, -3},
    {11, 33, 21, true, false, false, true, false, false, true, 0, -0.1, 0, 2, pycse::ExcludeBy::relative, true},
    {19, 19, 8, false, false, false, true, false, true, true, 0, 0.1, 2, 0, pycse::ExcludeBy::constant},
    {23, 23, 8, true, true, false, true, false, true, true, 0, 0, 0, 0, pycse::ExcludeBy::relative, true},
};

struct Problem {
  Case c;
  Matrix<int64_t> positives, query_ids, key_ids;
  Matrix<float> above;
  Matrix<double> wide_above;
  explicit Problem(const Case& c)
      : c(c), positives(c.B, 1), query_ids(c.B, 1), key_ids(c.N, 1), above(c.B, 1), wide_above(c.B, 1) {
    Random random(7);
    above.set([&](int64_t, int64_t) { return 0.3 * random.normal(); });
    wide_above.set([&](int64_t i, int64_t) { return double(above(i)); });
    for (int64_t i = 0; i < c.B; ++i) positives(i) = random.below(c.N), query_ids(i) = random.below(5);
    for (int64_t j = 0; j < c.N; ++j) key_ids(j) = c.symmetric ? query_ids(j) : random.below(5);
  }
  int64_t positive(int64_t i) const { return c.positives ? positives(i) : i; }
  double positive_logit(double s) const { return ((c.focal ? s : 1) * s - c.margin) / c.tau; }
  double positive_slope(double s) const { return (c.focal ? 2 * s : 1) / c.tau; }
  double logit(double s, bool own) const {
    return (c.focal ? s + c.m : 1) * s / c.tau + c.hardness * s + (own ? c.hard_hardness * s + c.hard : 0);
  }
  double slope(double s) const { return (c.focal ? 2 * s + c.m : 1) / c.tau; }
  double bound(int64_t i, double s_pos) const {
    const double d = c.each ? wide_above(i) : c.above;
    return c.by == pycse::ExcludeBy::constant ? d
                                              : s_pos + d * (c.by == pycse::ExcludeBy::relative ? std::abs(s_pos) : 1);
  }
};

struct Truth {
  Values loss, D, lneg, lpos;                   // D: dL/ds (B, N); lneg, lpos of the rows
  std::array<Values, pycse::kGradients> dlogit;  // of the coefficients, by rows
};

// One direction: rows of s (B, N) or, turned, its columns.
void add_direction(const Problem& q, const Values& s, const Values& coef, bool turned, double share, Truth& t) {
  const Case& c = q.c;
  const int64_t rows = turned ? c.N : c.B, others = turned ? c.B : c.N;
  for (int64_t i = 0; i < rows; ++i) {
    const auto at = [&](int64_t j) { return turned ? j * c.N + i : i * c.N + j; };
    const int64_t p = turned ? i : q.positive(i);
    const double s_pos = s[at(p)], l_pos = q.positive_logit(s_pos), bound = q.bound(i, s_pos);
    Values l(others, -INFINITY);
    double top = l_pos;
    for (int64_t j = 0; j < others; ++j) {
      if (j == p) continue;
      if (c.ids && (turned ? q.query_ids(j) == q.key_ids(i) : q.query_ids(i) == q.key_ids(j))) continue;
      if (c.exclude && s[at(j)] > bound) continue;
      l[j] = q.logit(s[at(j)], !turned && j >= c.B && j % c.B == i);
      top = std::max(top, l[j]);
    }
    double z_neg = 0;
    for (double x : l) z_neg += std::exp(x - top);
    const double z = z_neg + std::exp(l_pos - top), k = share * coef[i];
    t.loss[i] += share * (top + std::log(z) - l_pos);
    if (!turned) t.lneg[i] = top + std::log(z_neg), t.lpos[i] = l_pos;
    for (int64_t j = 0; j < others; ++j) {
      if (l[j] == -INFINITY) continue;
      const double P = k * std::exp(l[j] - top) / z;
      t.D[at(j)] += P * q.slope(s[at(j)]);
      t.dlogit[3][i] += P * s[at(j)] * s[at(j)], t.dlogit[4][i] += P * s[at(j)];
    }
    const double P_pos = -k * z_neg / z;
    t.D[at(p)] += P_pos * q.positive_slope(s_pos);
    t.dlogit[0][i] += P_pos * s_pos * s_pos, t.dlogit[1][i] += P_pos * s_pos, t.dlogit[2][i] += P_pos;
  }
}

Truth truth(const Problem& q, const Values& s, const Values& coef) {
  const Case& c = q.c;
  Truth t{Values(c.B), Values(c.B * c.N), Values(c.B), Values(c.B), {}};
  for (Values& d : t.dlogit) d = Values(c.B);
  add_direction(q, s, coef, false, c.symmetric ? 0.5 : 1, t);
  if (c.symmetric) add_direction(q, s, coef, true, 0.5, t);
  return t;
}
double sum(const Values& x) {
  double total = 0;
  for (double v : x) total += v;
  return total;
}

template <class A>
void totals(const Matrix<A>& dlogit, const Truth& t, double band) {
  Matrix<double> seen(pycse::kGradients, 1);
  seen.set([&](int64_t k, int64_t) {
    double total = 0;
    for (int64_t i = 0; i < dlogit.columns; ++i) total += dlogit.value(k, i);
    return total;
  });
  close("dlogit", seen, [&](int64_t k, int64_t) { return sum(t.dlogit[k]); }, band, double(dlogit.columns));
}

template <class T>
pycse::Contrastive native(const Problem& q, const Matrix<acc<T>>& r2, const Matrix<acc<T>>& coef, Matrix<acc<T>>& loss,
                          Matrix<acc<T>>& dlogit) {
  const Case& c = q.c;
  pycse::Contrastive p;
  p.B = c.B, p.N = c.N;
  const double q1 = c.focal / c.tau, b = (c.focal ? c.m : 1) / c.tau;
  p.logit = {{q1, c.focal ? 0 : 1 / c.tau, -c.margin / c.tau, q1, b + c.hardness, b, c.hard_hardness, c.hard}};
  p.fixed_shift = c.fixed;
  if (c.fixed) p.shift = (1 + c.m) / c.tau + std::max(c.hard, 0.0) + c.hardness + std::abs(c.hard_hardness);
  p.exclude = {c.exclude, c.by, c.above, nullptr};
  if (c.each) p.exclude.each = sizeof(acc<T>) == 4 ? static_cast<const void*>(q.above.at) : q.wide_above.at;
  p.r2 = r2.at, p.coef = coef.at, p.loss = loss.at;
  if (c.positives) p.positives = q.positives.at;
  if (c.ids) p.query_ids = q.query_ids.at, p.key_ids = q.key_ids.at;
  if (c.params) p.dlogit = dlogit.at;
  return p;
}

// Rows, columns and the symmetric gradient over panels of some rows each.
template <class T>
void panels(const Kernels& k, const Case& c) {
  using A = acc<T>;
  const Problem q(c);
  Random random(c.B * 1000 + c.N);
  Matrix<T> S(c.B, c.N, 3);
  Matrix<A> r2(c.N, 1), coef(c.B, 1), loss(c.B, 1), dlogit(pycse::kGradients, c.B), s_pos(c.B, 1), lse_column(c.N, 1);
  Matrix<double> lpos(c.B, 1), lneg(c.B, 1), column_max(c.N, 1), column_sum(c.N, 1), lneg_column(c.N, 1);
  r2.set([&](int64_t, int64_t) { return 0.5 + random.uniform(); });
  coef.set([&](int64_t, int64_t) { return random.normal(); });
  S.set([&](int64_t i, int64_t j) { return std::tanh(0.3 * random.normal() + (j == q.positive(i))) / double(r2(j)); });
  Values s(c.B * c.N), weights(c.B);
  for (int64_t i = 0; i < c.B; ++i) {
    weights[i] = coef(i);
    for (int64_t j = 0; j < c.N; ++j) s[i * c.N + j] = S.value(i, j) * double(r2(j));
    s_pos(i) = A(s[i * c.N + q.positive(i)]);
  }
  const Truth t = truth(q, s, weights);
  pycse::Contrastive p = native<T>(q, r2, coef, loss, dlogit);
  p.s_pos = s_pos.at, p.lpos = lpos.at, p.lneg = lneg.at;
  Matrix<A> f(c.B, 1);
  const int64_t step = c.B > 8 ? (c.B + 1) / 2 : c.B;
  const auto panel = [&](int64_t i0) {
    return pycse::Panel{{&S(i0), S.ld, i0, std::min(step, c.B - i0), f.at + i0}, kType<T>, kThreads};
  };
  if (c.symmetric) {
    p.column_max = column_max.at, p.column_sum = column_sum.at, p.lneg_column = lneg_column.at,
    p.lse_column = lse_column.at;
    column_max.set([](int64_t, int64_t) { return -INFINITY; });
    column_sum.set([](int64_t, int64_t) { return 0; });
    for (int64_t i0 = 0; i0 < c.B; i0 += step) k.rows(p, panel(i0), false), k.columns(p, panel(i0));
    for (int64_t j = 0; j < c.N; ++j) {
      lneg_column(j) = column_sum(j) == 0 ? -INFINITY : (std::log2(column_sum(j)) + column_max(j)) * std::log(2.0);
      lse_column(j) = A(std::log(std::exp(lneg_column(j)) + std::exp(lpos(j))));
    }
    for (int64_t i0 = 0; i0 < c.B; i0 += step) k.symmetric(p, panel(i0));
    f.set([](int64_t, int64_t) { return 1; });
  } else {
    for (int64_t i0 = 0; i0 < c.B; i0 += step) k.rows(p, panel(i0), true);
    close("loss", loss, [&](int64_t i, int64_t) { return t.loss[i]; }, kBand<A>, 1);
  }
  close("lpos", lpos, [&](int64_t i, int64_t) { return t.lpos[i]; }, kBand<A>, 1);
  Matrix<double> lneg_seen(c.B, 1);
  lneg_seen.set([&](int64_t i, int64_t) { return std::isinf(t.lneg[i]) && lneg(i) == t.lneg[i] ? 0 : lneg(i); });
  close("lneg", lneg_seen, [&](int64_t i, int64_t) { return std::isinf(t.lneg[i]) ? 0 : t.lneg[i]; }, kBand<A>, 1);
  expect(S.gaps_untouched(), "S");
  Matrix<double> G(c.B, c.N);  // with the rows' factors
  G.set([&](int64_t i, int64_t j) { return S.value(i, j) * double(f(i)); });
  close("G", G, [&](int64_t i, int64_t j) { return t.D[i * c.N + j] * double(r2(j)); }, kBand<T>, 1e-3);
  if (!c.params) return;
  totals(dlogit, t, 10 * kBand<A>);
}

// Row n of z is 0, row n + 1 short; keys resemble their positives.
template <class T>
void embeddings(Matrix<T>& z1, Matrix<T>& z2, const Problem& q) {
  Random random(z1.rows + z2.rows + z1.columns);
  Matrix<double> base(z2.rows, z2.columns);
  base.set([&](int64_t, int64_t) { return random.normal(); });
  z2.set([&](int64_t i, int64_t j) { return base(i, j) * (i == 2 ? 0 : i == 4 ? 1e-3 : 1); });
  z1.set([&](int64_t i, int64_t j) { return base(q.positive(i), j) + 0.7 * random.normal(); });
}

Values lengths(const std::function<double(int64_t, int64_t)>& z, int64_t n, int64_t D) {
  Values length(n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < D; ++d) length[i] += z(i, d) * z(i, d);
    length[i] = std::sqrt(length[i]);
  }
  return length;
}
double inverse(double length) { return length <= 1e-12 ? 0 : 1 / length; }

// k (g - zhat <zhat, g>) of row i, feature d, with zhat = r z.
template <class G>
double projected(const G& g, const std::function<double(int64_t)>& z, double r, double k, int64_t D, int64_t d) {
  double along = 0;
  for (int64_t e = 0; e < D; ++e) along += g(e) * r * z(e);
  return k * (g(d) - r * z(d) * along);
}

template <class T>
void small_case(const Kernels& k, const Case& c, bool normalize, bool want_dz1, bool want_dz2) {
  const Problem q(c);
  Matrix<T> z1(c.B, c.D, 5), z2(c.N, c.D, 2), dz1(c.B, c.D), dz2(c.N, c.D);
  Matrix<float> coef(c.B, 1), loss(c.B, 1), dlogit(pycse::kGradients, c.B), total(1, 1), none(0, 1);
  embeddings(z1, z2, q);
  if (!normalize) {
    const auto scale = [](Matrix<T>& z) {
      const auto length = lengths([&](int64_t i, int64_t d) { return z.value(i, d); }, z.rows, z.columns);
      z.set([&](int64_t i, int64_t d) { return z.value(i, d) * inverse(length[i]); });
    };
    scale(z1), scale(z2);
  }
  Random random(3);
  coef.set([&](int64_t, int64_t) { return 0.2 + random.uniform(); });
  const auto v1 = [&](int64_t i, int64_t d) { return z1.value(i, d); },
             v2 = [&](int64_t i, int64_t d) { return z2.value(i, d); };
  Values r1(c.B, 1), r2(c.N, 1), s(c.B * c.N), weights(c.B);
  if (normalize) {
    const Values n1 = lengths(v1, c.B, c.D), n2 = lengths(v2, c.N, c.D);
    for (int64_t i = 0; i < c.B; ++i) r1[i] = inverse(n1[i]);
    for (int64_t j = 0; j < c.N; ++j) r2[j] = inverse(n2[j]);
  }
  for (int64_t i = 0; i < c.B; ++i) {
    weights[i] = coef(i);
    for (int64_t j = 0; j < c.N; ++j) {
      double dot = 0;
      for (int64_t d = 0; d < c.D; ++d) dot += v1(i, d) * v2(j, d);
      s[i * c.N + j] = dot * r1[i] * r2[j];
    }
  }
  const Truth t = truth(q, s, weights);
  pycse::Contrastive p = native<float>(q, none, coef, loss, dlogit);
  p.r2 = nullptr;
  Matrix<float> work(pycse::small_work_size(c.B, c.N, c.D, kType<T>, c.symmetric), 1);
  const pycse::Small call = {kType<T>,
                             c.D,
                             z1.ld,
                             z2.ld,
                             z1.at,
                             z2.at,
                             normalize,
                             c.symmetric,
                             work.at,
                             want_dz1 ? dz1.at : nullptr,
                             want_dz2 ? dz2.at : nullptr,
                             total.at,
                             kThreads};
  expect(k.small(p, call), "small took the batch");
  close("loss", loss, [&](int64_t i, int64_t) { return t.loss[i]; }, 10 * kBand<float>, 1);
  double weighted = 0, size = 1;
  for (int64_t i = 0; i < c.B; ++i) weighted += weights[i] * t.loss[i], size += weights[i];
  close("total", total, [&](int64_t, int64_t) { return weighted; }, 10 * kBand<float>, size);
  if (want_dz1)
    close(
        "dz1", dz1,
        [&](int64_t i, int64_t d) {
          const auto g = [&](int64_t e) {
            double x = 0;
            for (int64_t j = 0; j < c.N; ++j) x += t.D[i * c.N + j] * r2[j] * v2(j, e);
            return x;
          };
          return normalize ? projected(g, [&](int64_t e) { return v1(i, e); }, r1[i], r1[i], c.D, d) : g(d);
        },
        10 * kBand<T>, 0.1);
  if (want_dz2)
    close(
        "dz2", dz2,
        [&](int64_t j, int64_t d) {
          const auto g = [&](int64_t e) {
            double x = 0;
            for (int64_t i = 0; i < c.B; ++i) x += t.D[i * c.N + j] * r1[i] * v1(i, e);
            return x;
          };
          return normalize ? projected(g, [&](int64_t e) { return v2(j, e); }, r2[j], r2[j], c.D, d) : g(d);
        },
        10 * kBand<T>, 0.1);
  if (!c.params) return;
  totals(dlogit, t, 100 * kBand<float>);
}

template <class T>
void norms(const Kernels& k, int64_t n, int64_t D) {
  using A = acc<T>;
  Random random(n + D);
  Matrix<T> z(n, D, 3), out(n, D, 2), keys(2 * n, D, 1);
  Matrix<A> r(n, 1), f(n, 1);
  const auto length = [](int64_t i) {
    return i == 1 ? 0 : i == 3 ? 1e15 : i == 5 ? 1e-9 : 1;
  };  // squares leave float's range
  z.set([&](int64_t i, int64_t) { return random.normal() * length(i); });
  keys.set([&](int64_t, int64_t) { return random.normal(); });
  const auto v = [&](int64_t i, int64_t d) { return z.value(i, d); };
  const Values norm = lengths(v, n, D);
  k.normalize(kType<T>, z.at, z.ld, n, D, r.at, out.at, out.ld, 0.5, kThreads);
  Matrix<double> unit(n, 1);  // of the inverse norms: their sizes differ
  unit.set([&](int64_t i, int64_t) { return norm[i] == 0 ? double(r(i)) : double(r(i)) * norm[i]; });
  close("r", unit, [&](int64_t i, int64_t) { return norm[i] <= 1e-12 ? 0 : 1; }, kBand<A>, 1);
  close("zhat", out, [&](int64_t i, int64_t d) { return 0.5 * v(i, d) * inverse(norm[i]); }, kBand<T>, 1);
  Matrix<A> alone(n, 1);
  k.normalize(kType<T>, z.at, z.ld, n, D, alone.at, nullptr, 0, 1, kThreads);
  expect(std::memcmp(alone.at, r.at, r.bytes()) == 0, "r without zhat");
  Matrix<T> only(n, D);
  k.normalize(kType<T>, z.at, z.ld, n, D, nullptr, only.at, D, 1, kThreads);
  close("zhat alone", only, [&](int64_t i, int64_t d) { return v(i, d) * inverse(norm[i]); }, kBand<T>, 1);

  // s of the positives, rows [1, n) of them.
  Matrix<A> s_pos(n, 1), r2(2 * n, 1);
  Matrix<int64_t> positives(n, 1);
  for (int64_t i = 0; i < n; ++i) positives(i) = random.below(2 * n);
  r2.set([&](int64_t, int64_t) { return 0.1 + random.uniform(); });
  for (bool given : {false, true}) {
    if (n < 2) break;
    pycse::Contrastive p;
    p.B = n, p.N = 2 * n, p.r2 = r2.at, p.s_pos = s_pos.at, p.positives = given ? positives.at : nullptr;
    k.positives(p, kType<T>, &only(1), only.ld, keys.at, keys.ld, D, 1, n - 1, kThreads);
    Matrix<A> written(n - 1, 1);
    written.set([&](int64_t i, int64_t) { return double(s_pos(i + 1)); });
    close(
        "s_pos", written,
        [&](int64_t i, int64_t) {
          const int64_t j = given ? positives(i + 1) : i + 1;
          double dot = 0;
          for (int64_t d = 0; d < D; ++d) dot += only.value(i + 1, d) * keys.value(j, d);
          return dot * double(r2(j));
        },
        kBand<A>, 1);
  }

  // The gradient, g in its own type or in bf16's accumulation type, by rows or transposed.
  f.set([&](int64_t, int64_t) { return random.normal(); });
  z.set([&](int64_t i, int64_t) { return i == 1 ? 0 : random.normal(); });
  const Values now = lengths(v, n, D);
  r.set([&](int64_t i, int64_t) { return inverse(now[i]); });
  const auto project = [&](auto type, bool transposed, bool scaled, bool factors) {
    using G = decltype(type);
    Matrix<G> g(transposed ? D : n, transposed ? n : D, transposed ? 3 : 0);
    g.set([&](int64_t, int64_t) { return random.normal(); });
    Matrix<T> dz(n, D);
    k.project(kType<T>, kType<G>, z.at, z.ld, g.at, transposed ? g.ld : 0, n, D, r.at, factors ? f.at : nullptr, scaled,
              dz.at, kThreads);
    close(
        "project", dz,
        [&](int64_t i, int64_t d) {
          const double own = r(i), factor = factors ? double(f(i)) : 1;
          return projected([&](int64_t e) { return transposed ? g.value(e, i) : g.value(i, e); },
                           [&](int64_t e) { return v(i, e); }, own, factor * (scaled ? double(own != 0) : own), D, d);
        },
        kBand<T>, 0.1);
  };
  for (bool transposed : {false, true})
    for (bool scaled : {false, true}) {
      project(T{}, transposed, scaled, true);
      project(acc<T>{}, transposed, scaled, false);
    }
}

template <class T>
void uniformity(const Kernels& k, int64_t N, int64_t c, int64_t i0, bool grad) {
  using A = acc<T>;
  const int64_t n = N - i0;
  Random random(N + c);
  Matrix<T> S(c, n, 1);
  Matrix<A> bias(N, 1), sums(N, 1);
  const double u = 3;
  S.set([&](int64_t, int64_t) { return std::tanh(random.normal()); });
  bias.set([&](int64_t, int64_t) { return -random.uniform(); });
  Matrix<double> E(c, n);
  E.set([&](int64_t i, int64_t j) {
    return i == j ? 0 : std::exp2(u * S.value(i, j) + double(bias(i0 + i)) + double(bias(i0 + j)));
  });
  const pycse::Uniformity p = {u, bias.at, sums.at};
  k.uniformity(p, {{S.at, S.ld, i0, c}, kType<T>, kThreads}, n, grad);
  if (grad) close("E", S, [&](int64_t i, int64_t j) { return E(i, j); }, kBand<T>);
  Matrix<A> own(c, 1);
  own.set([&](int64_t i, int64_t) { return double(sums(i0 + i)); });
  close(
      "sums", own,
      [&](int64_t i, int64_t) {
        double total = 0;
        for (int64_t j = 0; j < n; ++j) total += (j < c ? 1 : 2) * E(i, j);
        return total;
      },
      kBand<A>, 1e-3);
}

template <class T>
void contrastive_of(const Kernels& k, const char* type) {
  for (const Case& c : kCases) {
    now = std::string("panels ") + type + " " + c.name();
    panels<T>(k, c);
  }
  for (const auto& [n, D] : {std::pair<int64_t, int64_t>{1, 1}, {3, 17}, {7, 33}, {35, 5}, {96, 9}}) {
    now = std::string("norms ") + type + " " + std::to_string(n) + "x" + std::to_string(D);
    norms<T>(k, n, D);
  }
  for (bool grad : {false, true})
    for (const auto& [N, c, i0] : {std::array<int64_t, 3>{2, 2, 0}, {19, 7, 5}, {70, 33, 0}, {70, 3, 67}}) {
      now = std::string("uniformity ") + type + " " + std::to_string(N) + " rows " + std::to_string(i0) + " + " +
            std::to_string(c);
      uniformity<T>(k, N, c, i0, grad);
    }
}

// Rows whose products might overflow are left to the panels, and nothing is written.
template <class T>
void too_long(const Kernels& k) {
  const Case c = {7, 9, 20};
  const Problem q(c);
  Matrix<T> z1(c.B, c.D), z2(c.N, c.D), dz1(c.B, c.D), dz2(c.N, c.D);
  Matrix<float> coef(c.B, 1), loss(c.B, 1), none(0, 1), work(pycse::small_work_size(c.B, c.N, c.D, kType<T>, false), 1);
  z1.set([](int64_t, int64_t) { return 1e19; }), z2.set([](int64_t, int64_t) { return 1e19; });
  coef.set([](int64_t, int64_t) { return 1; });
  const pycse::Small call = {kType<T>, c.D,     z1.ld,  z2.ld,  z1.at,   z2.at,   true,
                             false,    work.at, dz1.at, dz2.at, nullptr, kThreads};
  expect(!k.small(native<float>(q, none, coef, loss, none), call), "rows that are too long are refused");
}

template <class T>
void small_of(const Kernels& k, const char* type) {
  now = std::string("small ") + type + " long rows";
  too_long<T>(k);
  for (const Case& c : kCases)
    for (int what = 0; what < 4; ++what) {
      now = std::string("small ") + type + " " + c.name() + " " + std::to_string(what);
      small_case<T>(k, c, what != 3, what != 1, what != 2);
    }
}

}  // namespace

void contrastive(const Kernels& k) {
  contrastive_of<float>(k, "fp32");
  contrastive_of<bf16>(k, "bf16");
  contrastive_of<double>(k, "fp64");
}
void small(const Kernels& k) {
  small_of<float>(k, "fp32");
  small_of<bf16>(k, "bf16");
}

}  // namespace checks
