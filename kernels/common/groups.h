// Group-P: where a teacher's ranking is cut into groups, for host and device. pycse/grouping.py defines the same.
//
// A row's teacher similarities t_j (the diagonal left out) are ranked by t descending (ties: lower column first).
//   mass_j = floor(2^28 exp((t_j - max t) / group_temperature))     integers: their sums do not depend on an order
// so_far is the inclusive sum of mass in rank order (kMass), or the number of ranks, this one included (kSize, kSpan).
//   kMass  group = number of g = 1 ... ceil(1/P) - 1 with so_far >= g P total
//   kSize  group = (so_far - 1) div size
//   kSpan  group 0 is the ranks [start, end); all others stay in place, group -1
// boundaries(so_far) never decreases with rank: a run of ranks with equal boundaries before and at its end is one group.
#pragma once
#include <math.h>
#include <stdint.h>

#include "logit.h"

namespace pycse {

enum class GroupKind : int { none = 0, mass = 1, size = 2, span = 3 };

constexpr double kMassOne = 268435456.0;  // 2^28: sums over 2^25 columns are exact in double

struct Grouping {
  GroupKind kind = GroupKind::none;
  double value = 0.1;  // P; ranks in a group; first rank of the span
  int64_t end = 0;     // of the span

  // Number of boundaries at or before so_far: the group, or for a span 0 before, 1 inside, 2 after.
  PYCSE_HD int64_t boundaries(int64_t so_far, int64_t total) const {
    switch (kind) {
      case GroupKind::mass: {
        const double c = double(so_far), z = double(total), last = ceil(1 / value) - 1;
        if (!(z > 0)) return 0;
        double g = floor(c / (value * z));
        g = g < 0 ? 0 : g > last ? last : g;
        if (g > 0 && c < g * value * z) g -= 1;
        else if (g < last && c >= (g + 1) * value * z) g += 1;
        return int64_t(g);
      }
      case GroupKind::size: return (so_far > 0 ? so_far - 1 : 0) / int64_t(value);
      case GroupKind::span: return so_far > end ? 2 : so_far > int64_t(value) ? 1 : 0;
      default: return 0;
    }
  }
  // The group of a rank from its boundaries; -1: stays in place.
  PYCSE_HD int64_t group(int64_t boundaries) const {
    return kind == GroupKind::span ? (boundaries == 1 ? 0 : -1) : boundaries;
  }
};

}  // namespace pycse
