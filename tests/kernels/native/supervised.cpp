// Checks of supervised.h.
//
//   l_ij = b s_ij   P(i): keys of the row's class but itself, n their number   z_pos, z: sums of exp(l) over P(i), over all
//   L_i  = log(n z / z_pos) inside, mean_P(log z - l) outside   D_ij = coef_i dL_i/ds_ij   dlogit_i = coef_i dL_i/db
#include <algorithm>

#include "check.h"

namespace checks {
namespace {

struct Case {
  int64_t B, N, groups;
  bool same = false, fixed = true, params = false, one_coef = false;
  double b = 20;
  std::string name() const {
    return std::to_string(B) + "x" + std::to_string(N) + " of " + std::to_string(groups) + (same ? " same" : "") +
           (fixed ? " shift" : "") + (params ? " params" : "") + (one_coef ? " one coef" : "") + " b " +
           std::to_string(b);
  }
};

// One row, one key, itself alone; rows without a positive, and without anything else; more positives in a block than a
// vector has lanes; ragged tails, blocks of 256 keys that end inside and after the last.
const Case kCases[] = {
    {1, 1, 1, false, true, true},
    {1, 1, 1, true},
    {2, 2, 1, true, false, true},
    {1, 17, 2, false, false, true, true},
    {3, 15, 9, false, true},
    {7, 16, 2, false, false, true, false, 200},
    {13, 13, 20, true, true, true},
    {33, 33, 4, true, false, true, true, 50},
    {5, 255, 1, false, true, true},
    {4, 256, 3, false, false, true},
    {3, 257, 2, false, true, true, false, 5},
    {259, 259, 7, true, true, false},
    {6, 521, 40, false, false, true, false, 300},
};

// The keys of each class, as pycse/backends/cpu/supervised.py lists them; a class without keys is the last.
struct Classes {
  std::vector<int64_t> ids1, ids2;
  Matrix<int64_t> ptr, keys, of_rows;
  explicit Classes(const Case& c)
      : ids1(c.B), ids2(c.N), ptr(chosen(c, ids1, ids2) + 2, 1), keys(c.N, 1), of_rows(c.B, 1) {
    std::vector<int64_t> found = ids2;
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    int64_t at = 0;
    for (size_t k = 0; k < found.size(); ++k) {
      ptr(int64_t(k)) = at;
      for (int64_t j = 0; j < c.N; ++j)
        if (ids2[j] == found[k]) keys(at++) = j;
    }
    ptr(ptr.rows - 2) = ptr(ptr.rows - 1) = at;
    for (int64_t i = 0; i < c.B; ++i) {
      const auto it = std::lower_bound(found.begin(), found.end(), ids1[i]);
      of_rows(i) = it != found.end() && *it == ids1[i] ? it - found.begin() : int64_t(found.size());
    }
  }

 private:
  static int64_t chosen(const Case& c, std::vector<int64_t>& ids1, std::vector<int64_t>& ids2) {
    Random random(c.B + 17 * c.N);
    for (int64_t& id : ids2) id = random.below(c.groups) - 1;
    for (int64_t& id : ids1) id = random.below(c.groups + (c.groups > 1)) - 1;  // one of them has no key
    if (c.same) ids1 = ids2;
    std::vector<int64_t> found = ids2;
    std::sort(found.begin(), found.end());
    return std::unique(found.begin(), found.end()) - found.begin();
  }
};

template <class T>
void supervised_case(const Kernels& k, const Case& c, bool inside, bool grad) {
  using A = acc<T>;
  const Classes q(c);
  Random random(c.B * 1000 + c.N);
  Matrix<T> S(c.B, c.N, 3), before(c.B, c.N, 3);
  Matrix<A> r2(c.N, 1), coef(c.B, 1), loss(c.B, 1), dlogit(1, c.B), f(c.B, 1);
  r2.set([&](int64_t, int64_t) { return 0.5 + random.uniform(); });
  coef.set([&](int64_t, int64_t) { return random.normal(); });
  S.set([&](int64_t, int64_t j) { return std::tanh(random.normal()) / double(r2(j)); });
  std::memcpy(before.at, S.at, S.bytes());

  Matrix<double> D(c.B, c.N), want(c.B, 1), want_dlogit(1, c.B);
  for (int64_t i = 0; i < c.B; ++i) {
    const double weight = c.one_coef ? 0.7 : double(coef(i));
    const auto s = [&](int64_t j) { return S.value(i, j) * double(r2(j)); };
    const auto itself = [&](int64_t j) { return c.same && j == i; };
    const auto positive = [&](int64_t j) { return !itself(j) && q.ids1[i] == q.ids2[j]; };
    double top = -INFINITY, top_pos = -INFINITY, z = 0, z_pos = 0, mean = 0, n = 0;
    for (int64_t j = 0; j < c.N; ++j) {
      if (!itself(j)) top = std::max(top, c.b * s(j));
      if (positive(j)) top_pos = std::max(top_pos, c.b * s(j)), mean += c.b * s(j), ++n;
    }
    mean /= n;
    for (int64_t j = 0; j < c.N; ++j) {
      if (!itself(j)) z += std::exp(c.b * s(j) - top);
      if (positive(j)) z_pos += std::exp(c.b * s(j) - top_pos);
    }
    const double log_z = top + std::log(z), log_pos = top_pos + std::log(z_pos);
    want(i) = n == 0 ? 0 : inside ? std::log(n) + log_z - log_pos : log_z - mean;
    want_dlogit(0, i) = 0;
    for (int64_t j = 0; j < c.N; ++j) {
      double P = n == 0 || itself(j) ? 0 : std::exp(c.b * s(j) - log_z);
      if (positive(j)) P -= inside ? std::exp(c.b * s(j) - log_pos) : 1 / n;
      D(i, j) = weight * P * c.b * double(r2(j));
      want_dlogit(0, i) += weight * P * s(j);
    }
  }

  pycse::Supervised p;
  p.B = c.B, p.N = c.N, p.b = c.b, p.same = c.same, p.inside = inside, p.r2 = r2.at, p.loss = loss.at;
  p.fixed_shift = c.fixed;
  if (c.fixed) p.shift = c.b - 40;
  p.ptr = q.ptr.at, p.keys = q.keys.at, p.classes = q.of_rows.at;
  p.coef_all = 0.7;
  if (!c.one_coef) p.coef = coef.at;
  if (c.params) p.dlogit = dlogit.at;
  const int64_t step = c.B > 4 ? (c.B + 1) / 2 : c.B;
  for (int64_t i0 = 0; i0 < c.B; i0 += step) {
    pycse::Panel panel = {{&S(i0), S.ld, i0, std::min(step, c.B - i0)}, kType<T>, kThreads};
    if (grad) panel.f = f.at + i0;
    k.supervised(p, panel, grad);
  }

  close("loss", loss, [&](int64_t i, int64_t) { return want(i); }, kBand<A>, 1);
  expect(S.gaps_untouched(), "between the rows of S");
  if (!grad) return expect(std::memcmp(before.at, S.at, S.bytes()) == 0, "S without gradients");
  Matrix<double> G(c.B, c.N);  // with the rows' factors
  G.set([&](int64_t i, int64_t j) { return S.value(i, j) * double(f(i)); });
  close("G", G, [&](int64_t i, int64_t j) { return D(i, j); }, kBand<T>, 1e-3);
  if (c.params) close("dlogit", dlogit, [&](int64_t, int64_t i) { return want_dlogit(0, i); }, 10 * kBand<A>, 1);
}

template <class T>
void supervised_of(const Kernels& k, const char* type) {
  for (const Case& c : kCases)
    for (bool inside : {false, true})
      for (bool grad : {false, true}) {
        now = std::string("supervised ") + type + " " + c.name() + (inside ? " inside" : "") + (grad ? " grad" : "");
        supervised_case<T>(k, c, inside, grad);
      }
}

}  // namespace

void supervised(const Kernels& k) {
  supervised_of<float>(k, "fp32");
  supervised_of<bf16>(k, "bf16");
  supervised_of<double>(k, "fp64");
}

}  // namespace checks
