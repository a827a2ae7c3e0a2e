// Group-P: where a teacher's ranking is cut into groups, for host and device. pycse/grouping.py defines the same.
//
// A row's teacher similarities t_j (the diagonal left out) are ranked by t descending (ties: lower column first).
//   mass_j = floor(2^28 exp((t_j - max t) / group_temperature))     integers: their sums do not depend on an order
// so_far is the inclusive sum of mass in rank order (mass), or the number of ranks, this one included (size, span).
//   mass  group = number of g = 1 ... ceil(1/P) - 1 with so_far >= g P total
//   size  group = (so_far - 1) div size
//   span  group 0 is the ranks [start, end); all others stay in place, group -1
// The boundaries before so_far never decrease with rank: a run of ranks with as many at both ends is of one group.
#pragma once
#include <math.h>
#include <stdint.h>

#include "target.h"

namespace pycse {

enum class GroupKind : int { none = 0, mass = 1, size = 2, span = 3 };

constexpr double kMassOne = 268435456.0;  // 2^28: sums over 2^25 columns are exact in double

struct Grouping {
  GroupKind kind = GroupKind::none;
  double value = 0.1;  // P; ranks in a group; first rank of the span
  int64_t end = 0;     // of the span

  // The first so_far with more than g boundaries at or before it.
  PYCSE_HD double limit(int64_t g, double total) const {
    switch (kind) {
      case GroupKind::mass: return double(g) < ceil(1 / value) - 1 ? double(g + 1) * value * total : HUGE_VAL;
      case GroupKind::size: return double(g + 1) * value + 1;
      case GroupKind::span: return g == 0 ? value + 1 : g == 1 ? double(end + 1) : HUGE_VAL;
      default: return HUGE_VAL;
    }
  }

  // Number of boundaries at or before so_far.
  PYCSE_HD int64_t boundaries(double so_far, double total) const {
    const double width = kind == GroupKind::mass ? value * total : value;
    int64_t g = 0;
    if (kind != GroupKind::span && width > 0) {
      const double guess = floor((kind == GroupKind::mass ? so_far : so_far - 1) / width);
      const double most = kind == GroupKind::mass ? ceil(1 / value) - 1 : guess;
      g = guess > 0 ? int64_t(guess < most ? guess : most) : 0;
      if (g > 0 && so_far < limit(g - 1, total)) --g;  // the division was rounded
    }
    while (so_far >= limit(g, total)) ++g;  // once at most, for a span twice
    return g;
  }

  // A rank's group from its boundaries; -1: it stays in place.
  PYCSE_HD int64_t group(int64_t boundaries) const {
    return kind == GroupKind::span ? (boundaries == 1 ? 0 : -1) : boundaries;
  }
};

}  // namespace pycse
