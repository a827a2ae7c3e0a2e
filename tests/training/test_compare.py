"""`pycse compare`: runs side by side, from their metrics.json."""

import json

import pytest
from test_cli import pycse
from tiny_models import needs_extras

pytestmark = needs_extras


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two seeds of one setting, one run of another, and one that failed."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    for name, lr, seed, value in (("a", 1e-5, 1, 0.5), ("b", 1e-5, 2, 0.6), ("c", 1e-4, 1, 0.4), ("d", 1.0, 1, None)):
        scores = {"lee": {"spearman": value, "uniformity": -1.0 - seed}}
        (tmp_path / name).mkdir()
        metrics = {
            "settings": {"lr": lr, "seed": seed, "recipe": "focal", "out": name},
            "model": {"name": "tiny"},
            "after": {} if value is None else scores,
            "steps": 4,
            "seconds": {"total": 2.0},
            "history": {
                "loss": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}],
                "scores": [{"step": 0, "scores": scores}],
            },
        }
        if value is None:
            metrics |= {"failed": "step 2: the loss is nan", "seconds": {}}
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path


def test_settings_that_differ_come_first_and_seeds_are_one_column(runs):
    code, stdout, stderr = pycse("compare", "a", "b", "c", "d", "--json", "out.json", "--picture", "out.png")
    assert code == 0, stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in stdout.splitlines() if line.startswith("│")]
    assert rows[0] == ["lr", "1e-05", "0.0001", "1"] and rows[1] == ["seeds", "1, 2", "1", "1"]
    assert ["lee: spearman (higher is better)", "0.5500 ± 0.0707 *", "0.4000", ""] in rows
    assert ["lee: uniformity (lower is better)", "-2.5000 ± 0.7071 *", "-2.0000", ""] in rows
    assert "recipe" not in stdout and "step 2: the loss is nan" in " ".join(stdout.split())
    found = json.loads((runs / "out.json").read_text())
    assert found["differing"] == ["lr"] and [one["folders"] for one in found["runs"]] == [["a", "b"], ["c"], ["d"]]
    assert found["runs"][0]["scores"][0]["mean"] == pytest.approx(0.55)

    from matplotlib.image import imread

    picture = imread(runs / "out.png")
    assert picture.shape[1] > 1000 and picture[..., :3].std() > 0.03


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["a", "nowhere"], "nowhere has no metrics.json"),
        (["a", "a"], "a is given 2 times"),
        (["a", "empty"], "empty has no metrics.json; it has not ended"),
        (["a", "broken"], "broken: cannot use metrics.json"),
        (["a", "--json", "a/metrics.json"], "a/metrics.json exists"),
        (["a", "--picture", "out.jpg"], "ends with .png"),
    ],
)
def test_runs_that_cannot_be_compared(runs, arguments, words):
    for name in ("empty", "broken"):
        (runs / name).mkdir()
    (runs / "empty" / "run.json").write_text("{}")
    (runs / "broken" / "metrics.json").write_text("[1]")
    code, _, stderr = pycse("compare", *arguments)
    assert code == 2 and words in stderr and stderr.count("\n") == 1, stderr
