// Checks of distill.h, shuffle.h and small_distill.h against pycse/grouping.py's definition, by sorting.
#include <algorithm>
#include <map>
#include <numeric>

#include "check.h"

namespace checks {
namespace {

using Values = std::vector<double>;

struct Case {
  int64_t B;
  pycse::GroupKind kind = pycse::GroupKind::none;
  double value = 0;
  int64_t end = 0;
  bool sample = true;
  pycse::Divergence divergence = pycse::Divergence::ce;
  std::string name() const {
    return std::to_string(B) + " kind " + std::to_string(int(kind)) + " " + std::to_string(value) +
           (sample ? " sample" : " expected") + " divergence " + std::to_string(int(divergence));
  }
};

// Groups of one member, of a few, of more than are sorted by counting; bins that a boundary cuts, and rows shorter than
// a vector.
const Case kCases[] = {
    {2},
    {3, pycse::GroupKind::mass, 0.3},
    {17, pycse::GroupKind::none, 0, 0, true, pycse::Divergence::kl},
    {19, pycse::GroupKind::size, 4, 0, true, pycse::Divergence::js},
    {33, pycse::GroupKind::mass, 0.1, 0, false, pycse::Divergence::kl},
    {70, pycse::GroupKind::span, 3, 20, true, pycse::Divergence::ce},
    {131, pycse::GroupKind::mass, 0.45, 0, true, pycse::Divergence::ce},
    {150, pycse::GroupKind::size, 60, 0, true, pycse::Divergence::ce},
    {151, pycse::GroupKind::span, 0, 150, false, pycse::Divergence::js},
};
constexpr double kStudent = 0.11, kTeacher = 0.09, kGroup = 0.8;
constexpr uint64_t kSeed = 0x123456789abcdef0u;

// Philox4x32-10, as its paper has it.
uint32_t philox(uint32_t block, uint32_t group, uint64_t row, int word) {
  uint32_t c[4] = {block, group, uint32_t(row), uint32_t(row >> 32)}, k[2] = {uint32_t(kSeed), uint32_t(kSeed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k[0], uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k[1],
                              uint32_t(a)};
    std::copy_n(next, 4, c);
    k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u;
  }
  return c[word];
}

// q shuffled inside its groups, or averaged over them; t and q of the n columns but the diagonal.
Values grouped(const Case& c, int64_t row, const Values& t, const Values& q) {
  if (c.kind == pycse::GroupKind::none) return q;
  const int64_t n = int64_t(t.size());
  std::vector<int64_t> rank(n);
  std::iota(rank.begin(), rank.end(), 0);
  std::stable_sort(rank.begin(), rank.end(), [&](int64_t x, int64_t y) { return t[x] > t[y]; });
  const auto mass = [&](int64_t k) { return std::floor(268435456.0 * std::exp((t[k] - t[rank[0]]) / kGroup)); };
  double total = 0, so_far = 0;
  for (int64_t k = 0; k < n; ++k) total += mass(k);
  std::map<int64_t, std::vector<int64_t>> groups;
  for (int64_t place = 0; place < n; ++place) {
    so_far += mass(rank[place]);
    int64_t g = 0;
    if (c.kind == pycse::GroupKind::size) g = place / int64_t(c.value);
    else if (c.kind == pycse::GroupKind::span) g = place >= c.value && place < c.end ? 0 : -1;
    else
      for (int64_t k = 1; k < std::ceil(1 / c.value); ++k) g += so_far >= double(k) * c.value * total;
    groups[g].push_back(rank[place]);
  }
  Values out = q;
  for (auto& [id, members] : groups) {
    if (id < 0) continue;
    std::sort(members.begin(), members.end());
    const int64_t size = int64_t(members.size());
    if (!c.sample) {
      double mean = 0;
      for (int64_t k : members) mean += q[k] / double(size);
      for (int64_t k : members) out[k] = mean;
      continue;
    }
    std::vector<int64_t> order(size);
    std::iota(order.begin(), order.end(), 0);
    if (size > 1)
      std::stable_sort(order.begin(), order.end(), [&, id = id](int64_t x, int64_t y) {
        return philox(uint32_t(x / 4), uint32_t(id), uint64_t(row), int(x % 4)) <
               philox(uint32_t(y / 4), uint32_t(id), uint64_t(row), int(y % 4));
      });
    for (int64_t k = 0; k < size; ++k) out[members[k]] = q[members[order[k]]];
  }
  return out;
}

// Loss and dL/ds (its diagonal 0) of row i.
double row_truth(const Case& c, int64_t i, const Values& s_row, const Values& t_row, double coef, Values& D) {
  Values s, t;
  for (int64_t j = 0; j < c.B; ++j)
    if (j != i) s.push_back(s_row[j]), t.push_back(t_row[j]);
  const auto softmax = [](const Values& x, double tau) {
    const double top = *std::max_element(x.begin(), x.end());
    double z = 0;
    Values p;
    for (double v : x) p.push_back(std::exp((v - top) / tau)), z += p.back();
    for (double& v : p) v /= z;
    return p;
  };
  const Values p = softmax(s, kStudent), before = softmax(t, kTeacher), q = grouped(c, i, t, before);
  const size_t n = p.size();
  double loss = 0, along = 0;
  Values g(n);
  for (size_t k = 0; k < n; ++k) {
    if (c.divergence == pycse::Divergence::js) {
      const double a = (p[k] + q[k]) / 2;
      along += p[k] * std::log(p[k] / a);
      loss += (p[k] * std::log(p[k] / a) + (q[k] > 0 ? q[k] * std::log(q[k] / a) : 0)) / 2;
    } else {
      loss -= q[k] * std::log(p[k]);
      if (c.divergence == pycse::Divergence::kl && before[k] > 0) loss += before[k] * std::log(before[k]);
      g[k] = (p[k] - q[k]) / kStudent;
    }
  }
  if (c.divergence == pycse::Divergence::js)
    for (size_t k = 0; k < n; ++k) g[k] = p[k] * (std::log(p[k] / ((p[k] + q[k]) / 2)) - along) / (2 * kStudent);
  D.assign(c.B, 0);
  for (int64_t j = 0, k = 0; j < c.B; ++j)
    if (j != i) D[j] = coef * g[k++];
  return loss;
}

pycse::Distill native(const Case& c, const void* coef, void* loss) {
  pycse::Distill d;
  d.B = c.B, d.inv_student = 1 / kStudent, d.inv_teacher = 1 / kTeacher, d.inv_group = 1 / kGroup;
  d.divergence = c.divergence, d.cut = {c.kind, c.value, c.end}, d.sample = c.sample, d.seed = kSeed;
  d.coef = coef, d.loss = loss;
  return d;
}

// Rows of a panel of two.
template <class T, class U>
void panels(const Kernels& k, const Case& c, bool grad) {
  using A = acc<T>;
  Random random(c.B);
  Matrix<T> S(c.B, c.B, 2);
  Matrix<U> teachers(c.B, c.B, 1);
  Matrix<A> coef(c.B, 1), loss(c.B, 1);
  S.set([&](int64_t, int64_t) { return std::tanh(random.normal() / 2); });
  teachers.set([&](int64_t, int64_t) { return std::tanh(random.normal() / 2); });
  coef.set([&](int64_t, int64_t) { return 0.2 + random.uniform(); });
  Matrix<double> want(c.B, 1), G(c.B, c.B);
  for (int64_t i = 0; i < c.B; ++i) {
    Values s, t, D;
    for (int64_t j = 0; j < c.B; ++j) s.push_back(S.value(i, j)), t.push_back(teachers.value(i, j));
    want(i) = row_truth(c, i, s, t, double(coef(i)), D);
    for (int64_t j = 0; j < c.B; ++j) G(i, j) = D[j];
  }
  const pycse::Distill d = native(c, coef.at, loss.at);
  const int64_t half = (c.B + 1) / 2;
  for (int64_t i0 = 0; i0 < c.B; i0 += half)
    k.distill(d, {{&S(i0), S.ld, i0, std::min(half, c.B - i0)}, kType<T>, kThreads}, kType<U>, &teachers(i0),
              teachers.ld, grad);
  close("loss", loss, [&](int64_t i, int64_t) { return want(i); }, 3 * kBand<A>, 1);
  if (grad) close("G", S, [&](int64_t i, int64_t j) { return G(i, j); }, 3 * kBand<T>, 1e-2);
}

// From embeddings: teachers of two widths and types, or logits.
template <class T>
void small_case(const Kernels& k, const Case& c, bool by_logits, bool normalize, bool want_dz) {
  const int64_t B = c.B, D = 21;
  Random random(B + 1);
  Matrix<T> z(B, D, 4), dz(B, D);
  Matrix<float> e1(B, 13, 1), coef(B, 1), loss(B, 1), logits(B, B, 3);
  Matrix<bf16> e2(B, 34, 2);
  z.set([&](int64_t, int64_t) { return random.normal() * (normalize ? 1 : 0.1); });
  e1.set([&](int64_t, int64_t) { return random.normal(); });
  e2.set([&](int64_t, int64_t) { return random.normal(); });
  logits.set([&](int64_t, int64_t) { return std::tanh(random.normal() / 2); });
  coef.set([&](int64_t, int64_t) { return 0.2 + random.uniform(); });
  const double weights[] = {0.3, 0.7};
  const auto gram = [&](const auto& x, bool unit) {
    Values length(B, 1), out(B * B);
    for (int64_t i = 0; unit && i < B; ++i) {
      length[i] = 0;
      for (int64_t d = 0; d < x.columns; ++d) length[i] += x.value(i, d) * x.value(i, d);
      length[i] = std::sqrt(length[i]);
    }
    for (int64_t i = 0; i < B; ++i)
      for (int64_t j = 0; j < B; ++j)
        for (int64_t d = 0; d < x.columns; ++d)
          out[i * B + j] += x.value(i, d) * x.value(j, d) / (length[i] * length[j]);
    return std::pair(out, length);
  };
  const auto [s, length] = gram(z, normalize);
  const Values t1 = gram(e1, true).first, t2 = gram(e2, true).first;
  Matrix<double> want(B, 1), G(B, B);
  for (int64_t i = 0; i < B; ++i) {
    Values s_row(s.begin() + i * B, s.begin() + (i + 1) * B), t_row, row;
    for (int64_t j = 0; j < B; ++j)
      t_row.push_back(by_logits ? logits.value(i, j) : weights[0] * t1[i * B + j] + weights[1] * t2[i * B + j]);
    want(i) = row_truth(c, i, s_row, t_row, double(coef(i)), row);
    for (int64_t j = 0; j < B; ++j) G(i, j) = row[j];
  }
  const pycse::Vectors teachers[] = {{DType::f32, e1.at, e1.ld, e1.columns}, {DType::bf16, e2.at, e2.ld, e2.columns}};
  pycse::SmallDistill q;
  q.z = {kType<T>, z.at, z.ld, D}, q.logits = {DType::f32, by_logits ? logits.at : nullptr, logits.ld, B};
  q.normalize = normalize, q.teachers = by_logits ? 0 : 2, q.teacher = by_logits ? nullptr : teachers,
  q.weight = by_logits ? nullptr : weights;
  Matrix<float> work(pycse::small_distill_work_size(B, D, q.teachers, kType<T>), 1);
  q.work = work.at, q.dz = want_dz ? dz.at : nullptr, q.threads = kThreads;
  expect(k.small_distill(native(c, coef.at, loss.at), q), "small_distill took the batch");
  close("loss", loss, [&](int64_t i, int64_t) { return want(i); }, 10 * kBand<float>, 1);
  if (!want_dz) return;
  close(
      "dz", dz,
      [&, &length = length](int64_t i, int64_t d) {
        const auto g = [&](int64_t e) {
          double x = 0;
          for (int64_t j = 0; j < B; ++j) x += (G(i, j) + G(j, i)) * z.value(j, e) / length[j];
          return x;
        };
        if (!normalize) return g(d);
        double along = 0;
        for (int64_t e = 0; e < D; ++e) along += g(e) * z.value(i, e) / length[i];
        return (g(d) - along * z.value(i, d) / length[i]) / length[i];
      },
      10 * kBand<T>, 0.1);
}

}  // namespace

void distill(const Kernels& k) {
  for (const Case& c : kCases) {
    now = "distill " + c.name();
    panels<float, float>(k, c, true);
    panels<float, double>(k, c, false);
    panels<float, bf16>(k, c, true);
    panels<bf16, bf16>(k, c, true);
    panels<bf16, float>(k, c, true);
    panels<bf16, double>(k, c, true);
    panels<double, double>(k, c, true);
    panels<double, float>(k, c, true);
    panels<double, bf16>(k, c, false);
    for (bool by_logits : {false, true})
      for (int what = 0; what < 3; ++what) {
        now = "small_distill " + c.name() + (by_logits ? " logits " : " teachers ") + std::to_string(what);
        small_case<float>(k, c, by_logits, what != 1, what != 2);
        small_case<bf16>(k, c, by_logits, what != 1, what != 2);
      }
  }
}

}  // namespace checks
