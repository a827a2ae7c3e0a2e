// Checks of sigmoid.h.
//
//   x_ij = y_ij (scale s_ij + bias), y = -1 for a positive   L_i = sum_j log(1 + exp(x_ij))
//   D_ij = coef_i dL_i/ds_ij = P_ij scale, P_ij = coef_i y_ij sigma(x_ij)   dscale_i = sum_j P_ij s_ij, dbias_i = sum_j P_ij
#include "check.h"

namespace checks {
namespace {

enum class Positives { own, given, ids };

struct Case {
  int64_t B, N;
  Positives positives = Positives::own;
  bool params = false, s_pos = false, one_coef = false;  // s_pos: the positives' similarities are given
  double scale = 10, bias = -10;
  int64_t groups = 3;
  std::string name() const {
    return std::to_string(B) + "x" + std::to_string(N) + " positives " + std::to_string(int(positives)) +
           (params ? " params" : "") + (s_pos ? " s_pos" : "") + (one_coef ? " one coef" : "") + " scale " +
           std::to_string(scale);
  }
};

// One row, one key, ragged tails, blocks of 256 keys that end inside and after the last; logits far outside exp's range;
// a row's positives none, some or all.
const Case kCases[] = {
    {1, 1},
    {1, 1, Positives::ids, true, false, false, 3, 0.5, 1},
    {1, 17, Positives::given, true, true},
    {2, 15, Positives::own, false, true},
    {7, 16, Positives::given, true, false, true, 100, -20},
    {13, 13, Positives::ids, true, false, false, 10, -10, 40},
    {5, 255, Positives::own, true},
    {4, 256, Positives::given, true, true, false, 500, 3},
    {3, 257, Positives::ids, true, false, true, 30, -1},
    {9, 271, Positives::ids, false, false, false, 10, 0, 1},
    {3, 521, Positives::given, true, false, false, 1, 0},
};

template <class T>
void sigmoid_case(const Kernels& k, const Case& c, bool grad) {
  using A = acc<T>;
  Random random(c.B * 1000 + c.N);
  Matrix<T> S(c.B, c.N, 3), before(c.B, c.N, 3);
  Matrix<A> r2(c.N, 1), coef(c.B, 1), loss(c.B, 1), s_pos(c.B, 1), dlogit(2, c.B);
  Matrix<int64_t> positives(c.B, 1), query_ids(c.B, 1), key_ids(c.N, 1);
  r2.set([&](int64_t, int64_t) { return 0.5 + random.uniform(); });
  coef.set([&](int64_t, int64_t) { return random.normal(); });
  s_pos.set([&](int64_t, int64_t) { return std::tanh(random.normal()); });  // not the panel's
  S.set([&](int64_t, int64_t j) { return std::tanh(random.normal()) / double(r2(j)); });
  std::memcpy(before.at, S.at, S.bytes());
  for (int64_t i = 0; i < c.B; ++i) positives(i) = random.below(c.N), query_ids(i) = random.below(c.groups) - 1;
  for (int64_t j = 0; j < c.N; ++j) key_ids(j) = random.below(c.groups) - 1;

  Matrix<double> D(c.B, c.N), want(c.B, 1), want_dlogit(2, c.B);
  for (int64_t i = 0; i < c.B; ++i) {
    double total = 0, ds = 0, db = 0;
    for (int64_t j = 0; j < c.N; ++j) {
      const int64_t own = c.positives == Positives::given ? positives(i) : i;
      const bool positive = c.positives == Positives::ids ? query_ids(i) == key_ids(j) : j == own;
      const bool given = positive && c.s_pos;
      const double s = given ? double(s_pos(i)) : S.value(i, j) * double(r2(j)), y = positive ? -1 : 1;
      const double x = y * (c.scale * s + c.bias), P = (c.one_coef ? 0.7 : double(coef(i))) * y / (1 + std::exp(-x));
      total += x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
      D(i, j) = P * c.scale * double(r2(j)), ds += P * s, db += P;
    }
    want(i) = total, want_dlogit(0, i) = ds, want_dlogit(1, i) = db;
  }

  pycse::Sigmoid p;
  p.B = c.B, p.N = c.N, p.scale = c.scale, p.bias = c.bias, p.r2 = r2.at, p.loss = loss.at;
  p.coef_all = 0.7;
  if (!c.one_coef) p.coef = coef.at;
  if (c.s_pos) p.s_pos = s_pos.at;
  if (c.positives == Positives::given) p.positives = positives.at;
  if (c.positives == Positives::ids) p.query_ids = query_ids.at, p.key_ids = key_ids.at;
  if (c.params) p.dlogit = dlogit.at;
  const int64_t step = c.B > 4 ? (c.B + 1) / 2 : c.B;
  for (int64_t i0 = 0; i0 < c.B; i0 += step)
    k.sigmoid_rows(p, {{&S(i0), S.ld, i0, std::min(step, c.B - i0)}, kType<T>, kThreads}, grad);

  close("loss", loss, [&](int64_t i, int64_t) { return want(i); }, kBand<A>, 1);
  expect(S.gaps_untouched(), "between the rows of S");
  if (!grad) return expect(std::memcmp(before.at, S.at, S.bytes()) == 0, "S without gradients");
  close("G", S, [&](int64_t i, int64_t j) { return D(i, j); }, kBand<T>, 1e-3);
  if (c.params) close("dlogit", dlogit, [&](int64_t n, int64_t i) { return want_dlogit(n, i); }, 10 * kBand<A>, 1);
}

template <class T>
void sigmoid_of(const Kernels& k, const char* type) {
  for (const Case& c : kCases)
    for (bool grad : {false, true}) {
      now = std::string("sigmoid ") + type + " " + c.name() + (grad ? " grad" : "");
      sigmoid_case<T>(k, c, grad);
    }
}

}  // namespace

void sigmoid(const Kernels& k) {
  sigmoid_of<float>(k, "fp32");
  sigmoid_of<bf16>(k, "bf16");
  sigmoid_of<double>(k, "fp64");
}

}  // namespace checks
