// Checks of prefixes.h and small_prefixes.h.
//
//   raw^k = sum_{b <= k} S^b,  s^k_ij = raw^k_ij rho^k_i r^k_j,  l = (q s + b) s, the positive's likewise
//   L = sum_k sum_i coef^k_i log(1 + sum_neg exp(l_ij - l_i,pos)),   G^k = dL/draw^k,  H^b = sum_{k >= b} G^k
#include <algorithm>
#include <numeric>

#include "check.h"

namespace checks {
namespace {

using Values = std::vector<double>;
using pycse::kGradients;

struct Case {
  int64_t B, N;
  std::vector<int64_t> dims;  // ascending
  bool focal = true, fixed = true, ids = false, params = false;
  double tau = 0.1;
  std::string name() const {
    return std::to_string(B) + "x" + std::to_string(N) + " lengths " + std::to_string(dims.size()) +
           (focal ? " focal" : "") + (fixed ? " shift" : "") + (ids ? " ids" : "") + (params ? " params" : "");
  }
};

// One length, a length of 1, the most there may be; blocks of 256 keys that end inside and after the last.
const Case kCases[] = {
    {1, 1, {1}},
    {2, 3, {1, 5}, false, false, true},
    {7, 9, {3, 8, 21}, true, false, true, true},
    {5, 256, {4, 5, 40}, true, true, false, true},
    {3, 271, {16, 33}, false, true, true, false, 0.02},
    {13, 15, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, true, true, true, true},
};

struct Problem {
  Case c;
  int K;
  Matrix<int64_t> positives, query_ids, key_ids;
  explicit Problem(const Case& c) : c(c), K(int(c.dims.size())), positives(c.B, 1), query_ids(c.B, 1), key_ids(c.N, 1) {
    Random random(11);
    for (int64_t i = 0; i < c.B; ++i) positives(i) = random.below(c.N), query_ids(i) = random.below(4);
    for (int64_t j = 0; j < c.N; ++j) key_ids(j) = random.below(4);
  }
  double tau(int k) const { return c.tau * (1 + 0.1 * k); }
  double q(int k) const { return c.focal / tau(k); }
  double b(int k) const { return (c.focal ? 0.3 : 1) / tau(k); }
  double positive_b(int k) const { return (c.focal ? 0 : 1) / tau(k); }
};

struct Truth {
  Values loss, G;                          // (K, B), dL/ds^k (K, B, N)
  std::array<Values, kGradients> dlogit;  // (K, B) each
};

// Of s (K, B, N) and coef (K, B).
Truth truth(const Problem& p, const Values& s, const Values& coef) {
  const Case& c = p.c;
  Truth t{Values(p.K * c.B), Values(p.K * c.B * c.N), {}};
  for (Values& d : t.dlogit) d = Values(p.K * c.B);
  for (int k = 0; k < p.K; ++k)
    for (int64_t i = 0; i < c.B; ++i) {
      const int64_t at = (k * c.B + i) * c.N, row = k * c.B + i, pos = p.positives(i);
      const double s_pos = s[at + pos], l_pos = (p.q(k) * s_pos + p.positive_b(k)) * s_pos;
      Values e(c.N);
      double z = 0;
      for (int64_t j = 0; j < c.N; ++j) {
        if (j == pos || (c.ids && p.query_ids(i) == p.key_ids(j))) continue;
        z += e[j] = std::exp((p.q(k) * s[at + j] + p.b(k)) * s[at + j] - l_pos);
      }
      t.loss[row] = std::log1p(z);
      for (int64_t j = 0; j < c.N; ++j) {
        const double P = coef[row] * e[j] / (1 + z), x = s[at + j];
        t.G[at + j] += P * (2 * p.q(k) * x + p.b(k));
        t.dlogit[3][row] += P * x * x, t.dlogit[4][row] += P * x;
      }
      const double P = -coef[row] * z / (1 + z);
      t.G[at + pos] += P * (2 * p.q(k) * s_pos + p.positive_b(k));
      t.dlogit[0][row] = P * s_pos * s_pos, t.dlogit[1][row] = P * s_pos, t.dlogit[2][row] = P;
    }
  return t;
}

// Of each length, with results of its own.
template <class A>
struct Natives {
  std::vector<pycse::Contrastive> of;
  Matrix<A> coef, loss, dlogit;
  Values weights;
  Natives(const Problem& p, const A* r2)
      : of(p.K), coef(p.K, p.c.B), loss(p.K, p.c.B), dlogit(p.K * kGradients, p.c.B), weights(p.K * p.c.B) {
    Random random(5);
    coef.set([&](int64_t, int64_t) { return 0.2 + random.uniform(); });
    for (int64_t x = 0; x < int64_t(weights.size()); ++x) weights[x] = coef(x / p.c.B, x % p.c.B);
    for (int k = 0; k < p.K; ++k) {
      pycse::Contrastive& one = of[k];
      one.B = p.c.B, one.N = p.c.N;
      one.logit = {{p.q(k), p.positive_b(k), 0, p.q(k), p.b(k), p.b(k), 0, 0}};
      one.fixed_shift = p.c.fixed;
      if (p.c.fixed) one.shift = p.q(k) + p.b(k);
      one.positives = p.positives.at;
      if (p.c.ids) one.query_ids = p.query_ids.at, one.key_ids = p.key_ids.at;
      one.coef = &coef(k), one.loss = &loss(k);
      if (r2) one.r2 = r2 + k * p.c.N;
      if (p.c.params) one.dlogit = &dlogit(k * kGradients);
    }
  }
  pycse::Prefixes prefixes() const {
    pycse::Prefixes result;
    for (const auto& one : of) result.of[result.lengths++] = &one;
    return result;
  }
  void check(const Truth& t, double band, bool params) {
    close("loss", loss, [&](int64_t k, int64_t i) { return t.loss[k * loss.columns + i]; }, band, 1);
    if (!params) return;
    close(
        "dlogit", dlogit,
        [&](int64_t x, int64_t i) { return t.dlogit[x % kGradients][x / kGradients * loss.columns + i]; }, 10 * band,
        1);
  }
};

template <class T>
void panels(const Kernels& k, const Case& c) {
  using A = acc<T>;
  const Problem p(c);
  const int K = p.K;
  Random random(c.B + 31 * c.N);
  Matrix<T> S(K * c.B, c.N, 3);
  Matrix<A> rho(K, c.B), r2(K, c.N), t(K, c.B), columns(K, c.N), s_pos(K, c.B);
  for (Matrix<A>* r : {&rho, &r2}) r->set([&](int64_t, int64_t) { return 0.5 + random.uniform(); });
  S.set([&](int64_t x, int64_t j) { return 0.1 * random.normal() + (x < c.B && j == p.positives(x)) / 2.0; });
  columns.set([&](int64_t x, int64_t) { return double(x); });  // which they are added to
  Values raw(K * c.B * c.N), s(raw.size());
  for (int64_t x = 0; x < K * c.B; ++x)
    for (int64_t j = 0; j < c.N; ++j) {
      raw[x * c.N + j] = S.value(x, j) + (x < c.B ? 0 : raw[(x - c.B) * c.N + j]);
      s[x * c.N + j] = raw[x * c.N + j] * double(rho(x / c.B, x % c.B)) * double(r2(x / c.B, j));
      if (j == p.positives(x % c.B)) s_pos(x / c.B, x % c.B) = A(s[x * c.N + j]);
    }
  Natives<A> given(p, r2.at);
  for (int of = 0; of < K; ++of) given.of[of].s_pos = &s_pos(of);
  pycse::Prefixes call = given.prefixes();
  call.step = c.B * S.ld, call.rho = rho.at, call.t = t.at, call.columns = columns.at;
  k.prefixes(call, pycse::Panel{{S.at, S.ld, 0, c.B, nullptr}, kType<T>, kThreads}, true);
  const Truth want = truth(p, s, given.weights);
  given.check(want, kBand<A>, c.params);
  const auto G = [&](int64_t x, int64_t j) {
    return want.G[x * c.N + j] * double(rho(x / c.B, x % c.B)) * double(r2(x / c.B, j));
  };
  close(
      "H", S,
      [&](int64_t x, int64_t j) {
        double sum = 0;
        for (int64_t y = x; y < K * c.B; y += c.B) sum += G(y, j);
        return sum;
      },
      kBand<T>, 1e-3);
  close(
      "t", t,
      [&](int64_t of, int64_t i) {
        double sum = 0;
        for (int64_t j = 0; j < c.N; ++j) sum += G(of * c.B + i, j) * raw[(of * c.B + i) * c.N + j];
        return sum;
      },
      10 * kBand<A>, 1);
  close(
      "columns", columns,
      [&](int64_t of, int64_t j) {
        double sum = double(of);
        for (int64_t i = 0; i < c.B; ++i) sum += G(of * c.B + i, j) * raw[(of * c.B + i) * c.N + j];
        return sum;
      },
      10 * kBand<A>, 1);
}

// dL/dz of row i, feature d, of L(s^k) with s^k_ij = <z_i, y_j> over the first d_k features times inverse norms.
double gradient(const Problem& p, const Truth& t, const Values& s, const Matrix<double>& z, const Matrix<double>& y,
                bool keys, int64_t i, int64_t d) {
  const auto norm = [](const Matrix<double>& x, int64_t row, int64_t D) {
    double square = 0;
    for (int64_t e = 0; e < D; ++e) square += x(row, e) * x(row, e);
    return std::sqrt(square);
  };
  double sum = 0;
  for (int k = 0; k < p.K; ++k) {
    const int64_t D = p.c.dims[k];
    if (d >= D) continue;
    const double own = norm(z, i, D);
    for (int64_t j = 0; j < y.rows; ++j) {
      const int64_t at = (k * p.c.B + (keys ? j : i)) * p.c.N + (keys ? i : j);
      sum += t.G[at] * (y(j, d) / (own * norm(y, j, D)) - s[at] * z(i, d) / (own * own));
    }
  }
  return sum;
}

template <class T>
void small_case(const Kernels& k, const Case& c) {
  const Problem p(c);
  const int64_t longest = c.dims.back(), D = longest + 2;
  Matrix<T> z1(c.B, D, 5), z2(c.N, D, 2), dz1(c.B, D), dz2(c.N, D);
  Random random(c.B + 7 * c.N);
  z2.set([&](int64_t, int64_t) { return random.normal(); });
  z1.set([&](int64_t i, int64_t d) { return z2.value(p.positives(i), d) + random.normal(); });
  Matrix<double> x1(c.B, D), x2(c.N, D);
  x1.set([&](int64_t i, int64_t d) { return z1.value(i, d); });
  x2.set([&](int64_t i, int64_t d) { return z2.value(i, d); });
  Values s(p.K * c.B * c.N);
  for (int of = 0; of < p.K; ++of)
    for (int64_t i = 0; i < c.B; ++i)
      for (int64_t j = 0; j < c.N; ++j) {
        double dot = 0, left = 0, right = 0;
        for (int64_t d = 0; d < c.dims[of]; ++d)
          dot += x1(i, d) * x2(j, d), left += x1(i, d) * x1(i, d), right += x2(j, d) * x2(j, d);
        s[(of * c.B + i) * c.N + j] = dot / std::sqrt(left * right);
      }
  Natives<float> given(p, nullptr);
  Matrix<float> work(pycse::small_prefixes_work_size(p.K, c.B, c.N, longest), 1);
  const pycse::Small call = {kType<T>, D,       z1.ld,  z2.ld,  z1.at,   z2.at,   true,
                             false,    work.at, dz1.at, dz2.at, nullptr, kThreads};
  expect(k.small_prefixes(given.prefixes(), c.dims.data(), call), "small_prefixes took the batch");
  const Truth want = truth(p, s, given.weights);
  given.check(want, 10 * kBand<float>, c.params);
  close("dz1", dz1, [&](int64_t i, int64_t d) { return gradient(p, want, s, x1, x2, false, i, d); }, 10 * kBand<T>, 1);
  close("dz2", dz2, [&](int64_t j, int64_t d) { return gradient(p, want, s, x2, x1, true, j, d); }, 10 * kBand<T>, 1);
  z2.set([&](int64_t, int64_t) { return 1e13; });
  expect(!k.small_prefixes(given.prefixes(), c.dims.data(), call), "rows that are too long are refused");
}

template <class T>
void panels_of(const Kernels& k, const char* type) {
  for (const Case& c : kCases) {
    now = std::string("prefixes ") + type + " " + c.name();
    panels<T>(k, c);
  }
}

template <class T>
void small_of(const Kernels& k, const char* type) {
  for (const Case& c : kCases) {
    now = std::string("small prefixes ") + type + " " + c.name();
    small_case<T>(k, c);
  }
}

}  // namespace

void prefixes(const Kernels& k) {
  panels_of<float>(k, "fp32");
  panels_of<double>(k, "fp64");
  panels_of<bf16>(k, "bf16");
  small_of<float>(k, "fp32");
  small_of<bf16>(k, "bf16");
}

}  // namespace checks
