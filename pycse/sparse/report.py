"""What `sparsify` did, layer by layer: printed as a table, plotted as a picture, kept as JSON."""

from __future__ import annotations

import io
import os
import re
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

UNITS = {"weight": "weights", "n:m": "weights", "block": "blocks", "head": "heads", "neuron": "neurons"}


@dataclass
class LayerReport:
    """One layer: counts are of the report's units.

    Fields:
        low, high: the lowest and the highest score of its groups.
        kernel: the pattern that its product uses afterwards; `reason` says why, or why the layer was left out.
        shrunk: a smaller dense layer took its place; `reason` says how wide.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    removed: int
    low: float | None = None
    high: float | None = None
    kernel: str = ""
    reason: str = ""
    skipped: bool = False
    shrunk: bool = False

    @property
    def why(self) -> str:
        """The reason without the layer's own numbers, so that layers share it."""
        return re.sub(r"^density [\d.]+%[,;] ", "", self.reason.split(" (")[0])


@dataclass
class Report:
    """What was removed from an encoder. It prints as a table; `plot` makes a picture, `as_dict` JSON.

    Fields:
        granularity, scope: as `sparsify` was called, with its defaults.
        sparsity: the share asked for, of the units in the layers that are not skipped; `share` is what it came to.
        layers: a LayerReport each.
        parameters_before, parameters_after: of the whole encoder.
        nonzero_before, nonzero_after: parameters of the whole encoder that are not 0.
    """

    granularity: str
    scope: str
    sparsity: float
    layers: list[LayerReport] = field(default_factory=list)
    parameters_before: int = 0
    parameters_after: int = 0
    nonzero_before: int = 0
    nonzero_after: int = 0

    @property
    def unit(self) -> str:
        return UNITS[self.granularity]

    @property
    def kept(self) -> int:
        return sum(layer.kept for layer in self.layers if not layer.skipped)

    @property
    def removed(self) -> int:
        return sum(layer.removed for layer in self.layers if not layer.skipped)

    @property
    def share(self) -> float:
        """Of the units that is gone."""
        return self.removed / (self.kept + self.removed)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"kept": self.kept, "removed": self.removed, "unit": self.unit}

    def summary(self) -> str:
        """One line."""
        return (
            f"{self.removed:,} of {self.kept + self.removed:,} {self.unit} removed ({self.share:.2%}); "
            f"{self.nonzero_before:,} -> {self.nonzero_after:,} parameters that are not 0"
        )

    def table(self) -> Table:
        """For a rich Console: a row a layer, and below them why layers are dense or were left alone."""
        from rich.table import Table

        prefix = common_prefix([layer.name for layer in self.layers])
        notes = [f"layers are named below {prefix[:-1]}"] if prefix else []
        table = Table(title=self.summary(), title_justify="left", caption_justify="left")
        table.add_column("layer", overflow="fold")
        for heading in ("shape", "kept", "removed", "share", "scores"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("kernel")
        for layer in self.layers:
            numbers = ["", "", "", ""]
            if not layer.skipped:
                share = layer.removed / max(1, layer.kept + layer.removed)
                numbers = [
                    f"{layer.kept:,}",
                    f"{layer.removed:,}",
                    f"{share:.1%}",
                    f"{layer.low:.1e} to {layer.high:.1e}",
                ]
            shape = "x".join(map(str, layer.shape))
            kernel = "left as it is" if layer.skipped else layer.kernel
            if layer.shrunk:
                kernel = layer.reason
            else:
                notes.append(f"{kernel}: {layer.why}")
            table.add_row(layer.name[len(prefix) :], shape, *numbers, kernel, style="dim" if layer.skipped else None)
        table.caption = "\n".join(dict.fromkeys(notes)) or None
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=160, markup=False, highlight=False, color_system=None).print(self.table())
        return text.getvalue()

    def plot(self, path: str | Path) -> None:
        """Write a picture: kept and removed units of every layer, and the range of their scores.

        Args:
            path: a file; its ending says the format (png, svg, pdf).

        Raises:
            FileNotFoundError, ValueError: no such folder, or a format that matplotlib does not write.
            ImportError: matplotlib is missing; it comes with `pip install 'pycse-kernels[train]'`.
        """
        layers = [layer for layer in self.layers if not layer.skipped]
        rows = range(len(layers))
        figure = new_figure(figsize=(11, 1.5 + 0.22 * len(layers)), layout="constrained")
        counts, ranges = figure.subplots(1, 2, sharey=True)
        counts.barh(rows, [layer.kept for layer in layers], color="tab:blue", label="kept")
        counts.barh(
            rows,
            [layer.removed for layer in layers],
            left=[layer.kept for layer in layers],
            color="tab:orange",
            label="removed",
        )
        counts.set_yticks(rows, [layer.name for layer in layers], fontsize=7)
        counts.invert_yaxis()
        counts.set_xlabel(self.unit)
        counts.legend()
        ends = [(layer.low or 0.0, layer.high or 0.0) for layer in layers]
        ranges.hlines(rows, *zip(*ends, strict=True), color="tab:blue")
        for x in zip(*ends, strict=True):
            ranges.plot(x, rows, "|", color="tab:blue")
        ranges.set_xscale("symlog", linthresh=min((high for _, high in ends if high > 0), default=1.0) * 1e-3)
        ranges.set_xlabel("score of a group, lowest to highest")
        for panel in (counts, ranges):
            panel.grid(axis="x", alpha=0.3)
        figure.suptitle(f"{self.granularity}, {self.scope} quota: {self.share:.1%} of the {self.unit} removed")
        figure.savefig(path, dpi=120)


def new_figure(**options: Any) -> Any:
    """A matplotlib Figure: not of pyplot, which wants a display and keeps state.

    On its first import matplotlib writes a font cache to the home folder, unless told of another place.
    """
    told = "MPLCONFIGDIR" in os.environ
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("MPLCONFIGDIR", cache)
        try:
            from matplotlib.figure import Figure
        finally:
            if not told:
                del os.environ["MPLCONFIGDIR"]
    return Figure(**options)


def common_prefix(names: list[str]) -> str:
    """What all dotted names begin with, up to a dot."""
    head, dot, _ = os.path.commonprefix(names).rpartition(".")
    return head + dot
