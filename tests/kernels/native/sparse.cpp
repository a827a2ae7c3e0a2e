// Checks of sparse.h, block_sparse.h, unstructured.h and block_tiles.h: products of a weight of which blocks, or single
// numbers, are kept.
#include <algorithm>
#include <array>

#include "check.h"

namespace checks {
namespace {

// What pycse/pattern.py and pycse/backends/cpu/sparse.py make of a mask.
struct Pattern {
  int64_t out, in;
  int b;
  std::vector<char> kept;  // (out / b, in / b)
  std::vector<int32_t> ptr, cols, t_ptr, t_rows;
  Matrix<int32_t> ptr_, cols_, t_ptr_, t_rows_, plan_, t_plan_;

  Pattern(int64_t out, int64_t in, int b, double density)
      : out(out),
        in(in),
        b(b),
        kept(choose(out / b, in / b, density)),
        ptr(offsets(false)),
        cols(places(false)),
        t_ptr(offsets(true)),
        t_rows(places(true)),
        ptr_(int64_t(ptr.size()), 1),
        cols_(int64_t(cols.size()), 1),
        t_ptr_(int64_t(t_ptr.size()), 1),
        t_rows_(int64_t(t_rows.size()), 1),
        plan_(b == 1 ? plan_size(in, out) : 0, 1),
        t_plan_(b == 1 ? plan_size(out, in) : 0, 1) {
    std::copy(ptr.begin(), ptr.end(), ptr_.at), std::copy(cols.begin(), cols.end(), cols_.at);
    std::copy(t_ptr.begin(), t_ptr.end(), t_ptr_.at), std::copy(t_rows.begin(), t_rows.end(), t_rows_.at);
    if (b == 1) plan(false, plan_), plan(true, t_plan_);
  }
  bool has(int64_t o, int64_t i) const { return kept[o / b * (in / b) + i / b]; }
  pycse::SparsePattern native(const void* packed = nullptr) const {
    return {out, in, b, ptr_.at, cols_.at, t_ptr_.at, t_rows_.at, plan_.at, t_plan_.at, packed};
  }
  int64_t count() const { return int64_t(cols.size()); }

 private:
  // An empty block row and an empty block column where there is more than one, a last one that is kept.
  static std::vector<char> choose(int64_t rows, int64_t columns, double density) {
    Random random(rows * 31 + columns);
    std::vector<char> kept(rows * columns);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) {
        const bool empty = density < 1 && ((rows > 1 && r == rows / 2) || (columns > 1 && c == 0));
        kept[r * columns + c] = !empty && (random.uniform() < density || (r + 1 == rows && c + 1 == columns));
      }
    return kept;
  }
  std::vector<int32_t> offsets(bool turned) const {
    const int64_t rows = out / b, columns = in / b;
    std::vector<int32_t> x = {0};
    for (int64_t r = 0; r < (turned ? columns : rows); ++r) {
      x.push_back(x.back());
      for (int64_t c = 0; c < (turned ? rows : columns); ++c)
        x.back() += kept[turned ? c * columns + r : r * columns + c];
    }
    return x;
  }
  std::vector<int32_t> places(bool turned) const {
    const int64_t rows = out / b, columns = in / b;
    std::vector<int32_t> x;
    for (int64_t r = 0; r < (turned ? columns : rows); ++r)
      for (int64_t c = 0; c < (turned ? rows : columns); ++c)
        if (kept[turned ? c * columns + r : r * columns + c]) x.push_back(int32_t(c));
    return x;
  }
  static int64_t chunks_of(int64_t features) {
    return std::max<int64_t>(1, (features + pycse::kSparseChunk - 1) / pycse::kSparseChunk);
  }
  int64_t plan_size(int64_t features, int64_t results) const {
    return chunks_of(features) * (pycse::kSparseChunk + 1 + results) + count() + (count() + 1) / 2;
  }
  // Chunk of features by chunk, in each the results with equally many kept weights together.
  void plan(bool turned, Matrix<int32_t>& into) const {
    const int64_t results = turned ? in : out, features = turned ? out : in, chunks = chunks_of(features);
    int32_t *lengths = into.at, *order = lengths + chunks * (pycse::kSparseChunk + 1),
            *source = order + chunks * results;
    auto* ats = reinterpret_cast<uint16_t*>(source + count());
    if (count() % 2) ats[count()] = 0;
    std::fill_n(lengths, chunks * (pycse::kSparseChunk + 1), 0);
    for (int64_t q = 0; q < chunks; ++q) {
      const int64_t f0 = q * pycse::kSparseChunk, f1 = std::min(features, f0 + pycse::kSparseChunk);
      const auto has = [&](int64_t result, int64_t feature) {
        return kept[turned ? feature * in + result : result * in + feature] != 0;
      };
      std::vector<std::pair<int32_t, int32_t>> many;  // kept weights, result
      for (int64_t o = 0; o < results; ++o) {
        int32_t n = 0;
        for (int64_t f = f0; f < f1; ++f) n += has(o, f);
        many.emplace_back(n, int32_t(o));
        ++lengths[q * (pycse::kSparseChunk + 1) + n];
      }
      std::sort(many.begin(), many.end());
      for (const auto& [n, o] : many) {
        *order++ = o;
        for (int64_t f = f0; f < f1; ++f) {
          if (!has(o, f)) continue;
          const int64_t row = turned ? f : o, column = turned ? o : f;
          *source++ = int32_t(std::lower_bound(cols.begin() + ptr[row], cols.begin() + ptr[row + 1], int32_t(column)) -
                              cols.begin());
          *ats++ = uint16_t((f - f0) * pycse::kAtStep);
        }
      }
    }
  }
};

template <class T>
void layer(const Kernels& k, const Pattern& p, int64_t n, bool bias, int threads) {
  using A = acc<T>;
  Random random(n + p.out);
  Matrix<T> x(n, p.in, 3), w(p.out, p.in, 5), dy(n, p.out, 1), b(p.out, 1), y(n, p.out), dx(n, p.in), dw(p.out, p.in);
  x.set([&](int64_t, int64_t) { return random.normal(); });
  dy.set([&](int64_t, int64_t) { return random.normal(); });
  b.set([&](int64_t, int64_t) { return random.normal(); });
  w.set([&](int64_t o, int64_t i) { return p.has(o, i) ? random.normal() : NAN; });  // what is not kept is not read
  std::vector<std::pair<int64_t, int64_t>> at;
  for (int64_t o = 0; o < p.out; ++o)
    for (int64_t i = 0; i < p.in; ++i)
      if (p.has(o, i)) at.emplace_back(o, i);
  Matrix<double> want_y(n, p.out), want_dx(n, p.in), want_dw(p.out, p.in);
  want_y.set([&](int64_t, int64_t o) { return bias ? b.value(o) : 0; });
  want_dx.set([](int64_t, int64_t) { return 0; });
  want_dw.set([](int64_t, int64_t) { return 0; });
  for (int64_t t = 0; t < n; ++t)
    for (const auto& [o, i] : at) {
      const double w_oi = w.value(o, i), x_i = x.value(t, i), dy_o = dy.value(t, o);
      want_y(t, o) += w_oi * x_i, want_dx(t, i) += w_oi * dy_o, want_dw(o, i) += x_i * dy_o;
    }
  Matrix<A> packed(p.b == 1 ? p.count() : 0, 1);
  if (p.b == 1) k.sparse_pack(p.native(), kType<T>, w.at, w.ld, packed.at, threads);
  for (bool by_packed : {false, true}) {
    if (by_packed && p.b > 1) continue;
    const pycse::SparsePattern pattern = p.native(by_packed ? packed.at : nullptr);
    k.sparse_product(pattern, kType<T>, x.at, x.ld, w.at, w.ld, bias ? b.at : nullptr, y.at, n, false, threads);
    close("y", y, [&](int64_t t, int64_t o) { return want_y(t, o); }, kBand<T>, 1e-3);
  }
  k.sparse_product(p.native(), kType<T>, dy.at, dy.ld, w.at, w.ld, nullptr, dx.at, n, true, threads);
  close("dx", dx, [&](int64_t t, int64_t i) { return want_dx(t, i); }, kBand<T>, 1e-3);
  k.sparse_outer(p.native(), kType<T>, dy.at, dy.ld, x.at, x.ld, dw.at, n, threads);
  close("dw", dw, [&](int64_t o, int64_t i) { return want_dw(o, i); }, kBand<T>, 1e-3);
}

// Results that are stored past the caches: 16 MB of them, few products.
void streamed(const Kernels& k) {
  const Pattern p(4096, 32, 32, 0.01);
  const int64_t n = 1027;
  Matrix<float> x(n, p.in), w(p.out, p.in);
  float* y = static_cast<float*>(std::aligned_alloc(64, (n * p.out * 4 + 63) / 64 * 64));
  std::memset(y, 0xff, n * p.out * 4);
  Random random(1);
  x.set([&](int64_t, int64_t) { return random.normal(); });
  w.set([&](int64_t o, int64_t i) { return p.has(o, i) ? random.normal() : NAN; });
  k.sparse_product(p.native(), DType::f32, x.at, x.ld, w.at, w.ld, nullptr, y, n, false, kThreads);
  bool right = true;
  for (int64_t t : {int64_t(0), n / 2, n - 1})
    for (int64_t o = 0; o < p.out; ++o) {
      double want = 0;
      for (int64_t i = 0; i < p.in; ++i) want += p.has(o, i) ? double(x(t, i)) * w.value(o, i) : 0;
      right = right && std::fabs(want - y[t * p.out + o]) <= 1e-4;
    }
  for (int64_t k = 0; k < n * p.out; ++k) right = right && y[k] == y[k];
  expect(right, "y past the caches");
  std::free(y);
}

template <class T>
void masked(const Kernels& k, int64_t out, int64_t in) {
  Random random(in);
  const int64_t words = (in + 31) / 32;
  Matrix<T> w(out, in, 3), result(out, in);
  Matrix<int32_t> bits(out, words);
  const auto kept = [&](int64_t o, int64_t i) { return uint32_t(bits(o, i / 32)) >> (i % 32) & 1u; };
  for (int64_t o = 0; o < out; ++o)
    for (int64_t q = 0; q < words; ++q) bits(o, q) = int32_t(uint32_t(random.next()));
  w.set([&](int64_t o, int64_t i) { return kept(o, i) ? random.normal() : NAN; });
  k.mask_weight(kType<T>, w.at, w.ld, bits.at, out, in, result.at, kThreads);
  close("W M", result, [&](int64_t o, int64_t i) { return kept(o, i) ? w.value(o, i) : 0; }, 0);
}

// fp32 by way of tiles, where the table has them.
void dense(const Kernels& k, int64_t out, int64_t in, int64_t n) {
  Random random(n);
  Matrix<float> x(n, in, 3), w(out, in, 1), dy(n, out, 2), y(n, out, 5), dx(n, in, 1), dw(out, in);
  const auto fill = [&](Matrix<float>& m) { m.set([&](int64_t, int64_t) { return random.normal(); }); };
  fill(x), fill(w), fill(dy);
  for (bool add : {false, true}) {
    const double one = add ? 1 : 0;
    if (add)
      y.set([](int64_t, int64_t) { return 1; }), dx.set([](int64_t, int64_t) { return 1; }),
          dw.set([](int64_t, int64_t) { return 1; });
    k.dense_product(x.at, x.ld, w.at, w.ld, out, in, y.at, y.ld, n, false, add, kThreads);
    close(
        "y", y,
        [&](int64_t t, int64_t o) {
          double sum = one;
          for (int64_t i = 0; i < in; ++i) sum += x.value(t, i) * w.value(o, i);
          return sum;
        },
        kBand<float>, 1);
    k.dense_product(dy.at, dy.ld, w.at, w.ld, out, in, dx.at, dx.ld, n, true, add, kThreads);
    close(
        "dx", dx,
        [&](int64_t t, int64_t i) {
          double sum = one;
          for (int64_t o = 0; o < out; ++o) sum += dy.value(t, o) * w.value(o, i);
          return sum;
        },
        kBand<float>, 1);
    k.dense_outer(dy.at, dy.ld, x.at, x.ld, out, in, dw.at, n, add, kThreads);
    close(
        "dw", dw,
        [&](int64_t o, int64_t i) {
          double sum = one;
          for (int64_t t = 0; t < n; ++t) sum += dy.value(t, o) * x.value(t, i);
          return sum;
        },
        kBand<float>, 1);
  }
}

template <class T>
void sparse_of(const Kernels& k, const char* type) {
  // Tokens: none, one, less than a panel, one and some, and as many as tiles want; both sides the wider one.
  for (const auto& [b, out, in] :
       {std::array<int64_t, 3>{16, 48, 80}, {16, 80, 32}, {32, 64, 128}, {32, 160, 32}, {64, 64, 192}, {64, 192, 64}})
    for (int64_t n : {0, 1, 7, 37, 131}) {
      now = std::string("block ") + std::to_string(b) + " " + type + " " + std::to_string(out) + "x" +
            std::to_string(in) + " " + std::to_string(n);
      layer<T>(k, Pattern(out, in, int(b), n == 37 ? 1 : 0.4), n, n % 2 == 1, n == 7 ? 7 : kThreads);
    }
  for (const auto& [out, in] : {std::array<int64_t, 2>{1, 1}, {5, 3}, {33, 150}, {150, 33}, {67, 261}})
    for (int64_t n : {0, 1, 5, 20, 50, 77, 150}) {
      now = std::string("single ") + type + " " + std::to_string(out) + "x" + std::to_string(in) + " " +
            std::to_string(n);
      layer<T>(k, Pattern(out, in, 1, 0.15), n, n % 2 == 1, kThreads);
    }
  if (std::is_same_v<T, float>)  // tiles by block columns, in one part and in two
    for (const auto& [out, in, n] : {std::array<int64_t, 3>{64, 128, 520}, {32, 4096, 513}}) {
      now = "by columns " + std::to_string(out) + "x" + std::to_string(in);
      layer<T>(k, Pattern(out, in, 32, 0.1), n, true, kThreads);
    }
  for (const auto& [out, in] : {std::array<int64_t, 2>{1, 1}, {3, 31}, {5, 32}, {4, 33}, {7, 100}}) {
    now = std::string("mask ") + type + " " + std::to_string(out) + "x" + std::to_string(in);
    masked<T>(k, out, in);
  }
}

}  // namespace

void sparse(const Kernels& k) {
  sparse_of<float>(k, "fp32");
  sparse_of<bf16>(k, "bf16");
  sparse_of<double>(k, "fp64");
  now = "streamed";
  streamed(k);
  if (!k.dense_product) return;
  for (const auto& [out, in, n] : {std::array<int64_t, 3>{32, 32, 1}, {96, 64, 45}, {64, 1120, 100}, {1056, 32, 33}}) {
    now = "dense " + std::to_string(out) + "x" + std::to_string(in) + " " + std::to_string(n);
    dense(k, out, in, n);
  }
}

}  // namespace checks
