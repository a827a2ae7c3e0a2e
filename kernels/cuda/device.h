// The launchers that stand in files of their own.
#pragma once
#include "contrastive.h"

namespace pycse::cuda {
void rows(const Contrastive&, DType, const Panel&, bool grad, Queue);
void columns(const Contrastive&, DType, const Panel&, Queue);
void symmetric(const Contrastive&, DType, const Panel&, Queue);
void distill(const Distill&, DType, const Panel&, DType teacher_type, const Teacher&, bool grad, Queue);
std::pair<int, int64_t> scratch(const Distill&, DType, int c, Queue);
void uniformity(const Uniformity&, DType, const Panel&, int n, bool grad, Queue);
void small(Contrastive, DType, Small, Queue);
bool small_runs(Queue);
void fused(const Contrastive&, Vectors z1hat, Vectors z2, const Panel&, void* partial, bool grad, int cluster, Queue);
bool fused_runs(Queue);
}  // namespace pycse::cuda
