"""The pictures of the method pages, drawn while the site is built. Each is a function that gives a figure.

What can be computed is computed by pycse itself: the logits of Focal-InfoNCE, the groups of Group-P.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib
import torch

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pycse import fused_focal_infonce, fused_infonce, grouping
from pycse.problem import Grouping

BLUE, ORANGE, GREEN, RED, GREY, LIGHT = "#3f51b5", "#ef6c00", "#2e7d32", "#c62828", "#757575", "#e0e0e0"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "svg.hashsalt": "pycse",  # the same picture from the same code
}


def figure(columns: int, width: float = 8.4, height: float = 3.0, **options) -> tuple[Figure, list]:
    made, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", **options)
    return made, [axes] if columns == 1 else list(axes)


def bare(axes, title: str = "") -> None:
    axes.set(xticks=[], yticks=[], title=title)
    axes.spines[:].set_visible(False)


def focal_infonce() -> Figure:
    """Logits over the similarity, and what a batch's gradient weighs: both by the losses themselves."""
    temperature, m = 0.05, 0.3
    s = torch.linspace(-0.6, 1.0, 161, dtype=torch.float64)
    made, (left, right) = figure(2)
    left.plot(s, s / temperature, color=GREY, label="InfoNCE: $s/\\tau$")
    left.plot(s, s * s / temperature, color=GREEN, label="Focal, positive: $s^2/\\tau$")
    left.plot(s, s * (s + m) / temperature, color=ORANGE, label=f"Focal, negative: $s(s+m)/\\tau$, $m={m}$")
    left.set(xlabel="cosine $s$", ylabel="logit", title="a pair's logit")
    left.legend(fontsize=8)

    # One row, its positive at 0.8 and a negative at each similarity: how hard the loss pushes each of them away.
    for loss, options, colour, label in (
        (fused_infonce, {}, GREY, "InfoNCE"),
        (fused_focal_infonce, {"m": m}, ORANGE, "Focal-InfoNCE"),
    ):
        similarities = torch.cat([torch.tensor([0.8], dtype=torch.float64), s])
        keys = torch.stack([similarities, (1 - similarities**2).clamp(min=0).sqrt()], 1).requires_grad_()
        row = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        loss(row, keys, temperature, normalize=False, backend="reference", **options).backward()
        push = keys.grad[1:, 0]  # type: ignore[index]
        right.semilogy(s, push / push.sum(), color=colour, label=label)
    right.axvline(0.8, color=GREEN, linestyle=":", linewidth=1)
    right.set_ylim(1e-10, 1)
    right.text(0.79, 1e-9, "positive", rotation=90, ha="right", color=GREEN, fontsize=8)
    right.set(xlabel="cosine of row and negative", ylabel="share of the gradient", title="who is pushed away")
    right.legend(fontsize=8)
    return made


def distillcse() -> Figure:
    """One row of a teacher: probabilities by rank, their groups, and one draw of the shuffle."""
    generator = torch.Generator().manual_seed(5)
    members = 24
    t = torch.cat([torch.zeros(1), 0.55 + 0.12 * torch.randn(members, generator=generator)])
    t = t.to(torch.float64)[None]
    cut = Grouping("mass", 0.1)
    group = grouping.groups(t, 0, cut, 1.0)[0, 1:]
    t = t[0, 1:]
    order = t.argsort(descending=True)
    q = (t / 0.15).softmax(0)[order]  # flatter than published, to be seen
    group = group[order]
    shuffled = q.clone()
    for one in group.unique():
        places = (group == one).nonzero()[:, 0]
        shuffled[places] = q[places[torch.randperm(len(places), generator=generator)]]
    made, (left, right) = figure(2, sharey=True)
    shades = [BLUE, ORANGE]
    for axes, values, title in ((left, q, "a teacher's probabilities"), (right, shuffled, "shuffled inside groups")):
        axes.bar(range(members), values, color=[shades[int(g) % 2] for g in group])
        axes.set(xlabel="rank of the sentence, by the teacher", title=title, xticks=range(0, members, 5))
    left.set_ylabel("$q_{ij}$")
    words = "a colour is a group,\na tenth of the mass"
    left.text(members - 1, float(q.max()) * 0.9, words, ha="right", va="top", fontsize=9)
    return made


def sparsecse() -> Figure:
    """What each granularity removes from one weight matrix, by the lowest of the same scores."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(16, 24, generator=generator) + torch.rand(16, 1, generator=generator)
    weight = scores >= scores.flatten().quantile(0.5)
    pairs = scores.view(16, 6, 4).argsort(2).argsort(2).view(16, 24) >= 2
    blocks = scores.view(4, 4, 6, 4).mean((1, 3))
    block = (blocks >= blocks.flatten().quantile(0.5)).repeat_interleave(4, 0).repeat_interleave(4, 1)
    rows = scores.mean(1)
    neuron = (rows >= rows.quantile(0.5))[:, None].expand(16, 24)
    heads = scores.view(4, 4, 24).mean((1, 2))
    head = (heads >= heads.quantile(0.5)).repeat_interleave(4)[:, None].expand(16, 24)
    made, axes = figure(5, height=1.9)
    for one, kept, title in zip(
        axes, (weight, pairs, block, head, neuron), ("weight", "2:4", "block", "head", "neuron")
    ):
        one.imshow(kept, cmap=matplotlib.colors.ListedColormap([LIGHT, BLUE]), vmin=0, vmax=1, interpolation="nearest")
        bare(one, title)
    made.supxlabel("half of a weight matrix removed (grey): the lowest scores of each unit", fontsize=9)
    return made


def matryoshka() -> Figure:
    """Prefixes of an embedding, and how a similarity of one length is a part of the next one's."""
    made, (left, right) = figure(2, height=2.7, gridspec_kw={"width_ratios": [1, 1.25]})
    lengths, shades = (64, 128, 256, 512, 768), plt.get_cmap("Blues")
    for k, length in enumerate(lengths):
        left.barh(-k, length, color=shades(0.9 - 0.15 * k), height=0.7)
        left.text(length + 12, -k, f"first {length}", va="center", fontsize=9)
    bare(left, "the loss at each length, summed")
    left.set_xlim(0, 980)
    begin = 0
    for k, length in enumerate(lengths):
        right.add_patch(Rectangle((begin, 0), length - begin, 1, facecolor=shades(0.9 - 0.15 * k), edgecolor="white"))
        right.plot([0, length], [-0.25 - 0.22 * k] * 2, color=shades(0.9 - 0.15 * k), linewidth=3)
        right.text(length + 10, -0.25 - 0.22 * k, f"$s^{{({length})}}$", va="center", fontsize=10)
        begin = length
    right.set(xlim=(0, 880), ylim=(-1.4, 1.15))
    bare(right, "one product: sums up to a block of features\nare the similarities of its length")
    return made


def static() -> Figure:
    """A text is the mean of its tokens' rows."""
    generator = torch.Generator().manual_seed(3)
    table = torch.rand(9, 16, generator=generator)
    words = ("[PAD]", "the", "river", "violin", "floods", "##ing", "in", "spring", "plays")
    chosen = [1, 2, 4, 6, 7]
    made, (left, right) = figure(2, height=2.7, gridspec_kw={"width_ratios": [1.15, 1]})
    shown = table.clone()
    left.imshow(shown, cmap="Blues", vmin=-0.3, vmax=1.4, aspect="auto")
    for row in chosen:
        left.add_patch(Rectangle((-0.5, row - 0.5), 16, 1, fill=False, edgecolor=ORANGE, linewidth=2))
    left.set(yticks=range(9), xticks=[], title="a table: a row a token")
    left.set_yticklabels(words)
    left.spines[:].set_visible(False)
    left.tick_params(length=0)
    right.imshow(
        table[chosen].mean(0)[None], cmap="Blues", vmin=-0.3, vmax=1.4, aspect="auto", extent=(-0.5, 15.5, 0, 1)
    )
    for k, length in enumerate((4, 8, 16)):
        right.annotate(
            "",
            (length - 0.5, -0.35 - 0.45 * k),
            (-0.5, -0.35 - 0.45 * k),
            arrowprops={"arrowstyle": "<->", "color": GREY},
        )
        right.text(length - 0.3, -0.35 - 0.45 * k, f"length {length}", va="center", fontsize=9)
    right.set(xlim=(-0.6, 19), ylim=(-1.7, 1.6))
    bare(right, "“The river floods in spring”:\nthe mean of five rows, good at every length")
    return made


def batches() -> Figure:
    """Which part of the similarities is in memory: in one process, in mini-batches, in several processes."""
    made, axes = figure(3, height=2.9)
    colours = (BLUE, ORANGE, GREEN, RED)
    one, cached, several = axes
    for each, title in zip(axes, ("one process", "cached: mini-batches", "four processes")):
        each.set(xlim=(-1.6, 8.4), ylim=(9.2, -0.9))
        each.set_aspect("equal")
        bare(each, title)
        each.add_patch(Rectangle((0, 0), 8, 8, facecolor="#f5f5f5", edgecolor=GREY, linewidth=0.8))
    one.add_patch(Rectangle((0, 2), 8, 1, facecolor=BLUE))
    one.annotate("", (4, 6.3), (4, 3.3), arrowprops={"arrowstyle": "->", "color": BLUE})
    one.text(4, 8.7, "a panel of rows at a time: $c \\times N$", ha="center", fontsize=8.5)
    for k in range(4):
        cached.add_patch(Rectangle((-1.3, 2 * k + 0.1), 0.9, 1.8, facecolor=colours[k], alpha=0.85))
    cached.add_patch(Rectangle((0, 2), 8, 1, facecolor=GREY, alpha=0.6))
    cached.text(4, 8.7, "the encoder by parts, the loss whole", ha="center", fontsize=8.5)
    for k in range(4):
        several.add_patch(Rectangle((0, 2 * k), 8, 2, facecolor=colours[k], alpha=0.25, edgecolor="white"))
        several.add_patch(Rectangle((0, 2 * k + 0.6), 8, 0.5, facecolor=colours[k]))
        several.text(-0.2, 2 * k + 1, f"{k}", ha="right", va="center", fontsize=9, color=colours[k])
        several.add_patch(Rectangle((2 * k, -0.75), 2, 0.55, facecolor=colours[k]))
    several.text(4, 8.7, "own rows, everybody's keys", ha="center", fontsize=8.5)
    one.text(4, -0.3, "N keys", ha="center", fontsize=8.5, color=GREY)
    one.text(-0.35, 4, "B rows", ha="center", va="center", rotation=90, fontsize=8.5, color=GREY)
    return made


PICTURES: dict[str, Callable[[], Figure]] = {
    "focal-infonce": focal_infonce,
    "distillcse": distillcse,
    "sparsecse": sparsecse,
    "matryoshka": matryoshka,
    "static": static,
    "batches": batches,
}


def svg(name: str) -> bytes:
    with plt.rc_context(STYLE):
        made = PICTURES[name]()
        file = io.BytesIO()
        made.savefig(file, format="svg", metadata={"Date": None})
        plt.close(made)
    return file.getvalue()
