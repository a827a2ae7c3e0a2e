# ruff: noqa: F811 (fixtures are arguments)
"""The distillcse recipe: teachers, their cache on disk, and whole small runs of the command."""

import json

import pytest
from test_cli import SENTENCES, files, place, run  # noqa: F401 (a fixture)
from tiny_models import make_model, needs_extras, tiny_model, wide_model  # noqa: F401 (fixtures)

from pycse.training.errors import UserError

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")


def distilled(place, tiny_model, out, *more):
    """metrics.json of a run whose student has layers 0 and 2 of the tiny model."""
    arguments = ("--recipe", "distillcse", "--layers", "0,2", "--batch-size", 6)
    code, stdout, stderr = run(place, tiny_model, out, *arguments, *more)
    assert code == 0, stderr
    return json.loads((place / out / "metrics.json").read_text()) | {"stdout": stdout}


def parts(metrics, name):
    return [entry[name] for entry in metrics["history"]["loss"]]


@pytest.fixture
def load(tiny_model):
    from pycse.training.encoder import load_encoder

    return lambda name=tiny_model: load_encoder(str(name), "cpu")


# ---- runs


@needs_extras
def test_the_student_comes_closer_to_its_teacher(place, tmp_path_factory, wide_model, load):
    from pycse import fused_distill
    from pycse.training.encoder import keep_layers

    def distance(student, teacher):
        """KL of the in-batch similarities of all sentences, without dropout."""
        z, e = (torch.from_numpy(encoder.encode(SENTENCES)) for encoder in (student, teacher))
        return fused_distill(z, [e], shuffle="none", divergence="kl", **sharp).item()

    # Random encoders find all sentences alike, up to dropout: only without it and at low temperatures are they told
    # apart.
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_size": 32}
    calm_model = make_model(tmp_path_factory, "abcdefghijklmnopqrstuvwxyz", seed=2, **calm)
    sharp = {"student_temperature": 0.004, "teacher_temperature": 0.002}
    temperatures = ("--student-temperature", 0.004, "--teacher-temperature", 0.002)
    options = ("--teacher", wide_model, "--steps", 40, "--lr", 0.001, "--distill-weight", 20, "--shuffle", "none")
    metrics = distilled(
        place, calm_model, "out", *options, *temperatures, "--positives", "next", "--batch-size", 11, "--max-length", 64
    )
    teacher, cut, student = load(wide_model), load(calm_model), load(place / "out" / "model")
    keep_layers(cut, [0, 2])
    assert distance(student, teacher) < 0.8 * distance(cut, teacher)
    distillation = parts(metrics, "distillation")
    assert np.mean(distillation[-8:]) < np.mean(distillation[:8])
    assert parts(metrics, "loss") == pytest.approx(
        [c + 20 * d for c, d in zip(parts(metrics, "contrastive"), distillation)], rel=1e-4
    )
    (described,) = metrics["teachers"]
    assert described["name"] == wide_model and described["width"] == 48 and described["embedded"] == 40 * 11
    assert metrics["settings"]["shuffle"] == "none" and metrics["settings"]["lr"] == 0.001
    for words in ("48 wide", "contrastive ", "distillation "):
        assert words in " ".join(metrics["stdout"].split())


@needs_extras
def test_the_default_teacher_is_the_uncut_encoder(place, tiny_model, wide_model):
    default = distilled(place, tiny_model, "default")
    named = distilled(place, tiny_model, "named", "--teacher", tiny_model)
    other = distilled(place, tiny_model, "other", "--teacher", wide_model)
    assert default["history"] == named["history"]
    assert default["teachers"][0]["name"] == f"{tiny_model}, uncut"
    assert parts(other, "distillation") != parts(named, "distillation")
    assert parts(other, "contrastive")[0] == parts(named, "contrastive")[0]  # the student's dropout is its own


@needs_extras
def test_teachers_of_several_widths_and_tokenizers(place, tiny_model, wide_model):
    metrics = distilled(place, tiny_model, "out", "--teacher", tiny_model, "--teacher", wide_model)
    assert [teacher["width"] for teacher in metrics["teachers"]] == [32, 48]


@needs_extras
@pytest.mark.parametrize(
    "options",
    [
        ("--shuffle", "expected", "--group-p", 0.5),
        ("--group-size", 2, "--divergence", "kl"),
        ("--span", 1, 4, "--divergence", "js", "--m", 0.3),
        ("--train-file", "triples.txt", "--hard-negative-weight", 0.5),
        ("--positives", "next", "--symmetric", "--student-temperature", 0.1),
        ("--bf16",),
    ],
    ids=lambda options: options[0],
)
def test_options_reach_the_loss(place, tiny_model, options):
    metrics = distilled(place, tiny_model, "out", *options)
    plain = distilled(place, tiny_model, "plain")
    assert all(np.isfinite(parts(metrics, "loss"))) and parts(metrics, "loss") != parts(plain, "loss")


@needs_extras
def test_the_same_seed_gives_the_same_distillation(place, tiny_model):
    a, b, c = (distilled(place, tiny_model, out, "--seed", seed) for out, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert a["history"] == b["history"] != c["history"]
    assert (place / "a/model/model.safetensors").read_bytes() == (place / "b/model/model.safetensors").read_bytes()


@needs_extras
def test_a_cache_serves_the_next_run(place, tiny_model, wide_model):
    options = ("--teacher", tiny_model, "--teacher", wide_model)
    without = distilled(place, tiny_model, "without", *options)
    first = distilled(place, tiny_model, "first", *options, "--cache-teachers", place / "cache")
    second = distilled(place, tiny_model, "second", *options, "--cache-teachers", place / "cache")
    for made, found in zip(first["teachers"], second["teachers"]):
        assert made["embedded"] > 0 and found["embedded"] == 0 and found["from_cache"] == 18
    assert first["history"] == second["history"]
    assert parts(without, "loss") == pytest.approx(parts(first, "loss"), rel=1e-5)
    assert len(list((place / "cache").glob("*.embeddings"))) == 2


BAD = {
    "absent teacher": (["--teacher", "./absent"], "--teacher: no such model folder: ./absent"),
    "hollow teacher": (["--teacher", "hollow"], "--teacher: hollow is no model"),
    "broken teacher": (["--teacher", "broken"], "--teacher: cannot load the model broken"),
    "teacher of simcse": (["--recipe", "simcse", "--teacher", "MODEL"], "--recipe simcse takes no --teacher"),
    "cache of focal": (["--recipe", "focal", "--cache-teachers", "c"], "takes no --cache-teachers"),
    "cache is a file": (["--cache-teachers", "text.txt"], "--cache-teachers text.txt: cannot write in text.txt"),
    "cache below a file": (["--cache-teachers", "text.txt/cache"], "cannot write in"),
    "own teacher": (["--layers", "all"], "would be its own teacher"),
    "group of focal": (["--recipe", "focal", "--group-p", "0.1"], "--group-p does not belong to --recipe focal"),
    "group mass": (["--group-p", "2"], "group_p"),
    "two groupings": (["--group-p", "0.1", "--group-size", "2"], "exclude each other"),
    "span beyond the batch": (["--span", "0", "9"], "span must satisfy"),
}


@needs_extras
@pytest.mark.parametrize("case", BAD)
def test_bad_teachers_are_one_line_and_change_nothing(place, tiny_model, case):
    arguments, words = BAD[case]
    (place / "hollow").mkdir()
    (place / "broken").mkdir()
    (place / "broken" / "config.json").write_text("{}")
    before = files(place)
    arguments = [tiny_model if word == "MODEL" else word for word in arguments]
    code, _, stderr = run(place, tiny_model, "out", "--recipe", "distillcse", "--layers", "0,2", *arguments)
    assert code == 2, stderr
    assert stderr.startswith("pycse train: error: ") and words in stderr and stderr.count("\n") == 1
    assert files(place) == before and not (place / "out").exists() and not (place / "c").exists()


# ---- teachers


@needs_extras
def test_a_teacher_is_in_evaluation_mode_and_has_no_gradient(load):
    from pycse.training.teachers import Teacher

    encoder = load().train()
    teacher = Teacher("t", encoder)
    z = teacher(SENTENCES)
    assert torch.equal(z, teacher(SENTENCES)) and z.shape == (len(SENTENCES), 32)
    assert not z.requires_grad and not z.is_inference()
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(z, teacher(SENTENCES))


@needs_extras
def test_a_teacher_reads_as_far_as_it_can(load):
    from pycse.training.teachers import Teacher

    teacher = Teacher("t", load())
    long, cut = "a " * 40 + "b", "a " * 40
    assert not torch.allclose(*teacher([long, cut]))
    teacher.encoder.max_seq_length = 16
    assert torch.allclose(*teacher([long, cut]))


@needs_extras
def test_a_teacher_says_whose_cache_it_cannot_use(load, tmp_path):
    from pycse.training.teachers import Teacher

    teacher = Teacher("t", load(), str(tmp_path / "cache"))
    teacher(SENTENCES[:2])
    path = teacher.cached.path
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="--cache-teachers: cannot (read|write) .*give another folder"):
        teacher(SENTENCES[2:])
    with pytest.raises(UserError, match="--cache-teachers: cannot write"):
        Teacher("t", load(), str(tmp_path / "cache"))


@needs_extras
def test_teachers_read_the_anchors_of_the_batch(tiny_model):
    from sentence_transformers import SentenceTransformer

    from pycse.sentence_transformers import TextCollator
    from pycse.training.loss import build_loss
    from pycse.training.settings import Settings

    encoder, read, values = SentenceTransformer(tiny_model, device="cpu").eval(), [], []

    def teacher(sentences):
        read.append(list(sentences))
        return torch.randn(len(sentences), 4, generator=torch.Generator().manual_seed(len(read[-1][0])))

    collate = TextCollator(encoder.preprocess)
    for _ in range(2):
        loss = build_loss(Settings(seed=5), encoder, [teacher, teacher])
        state = torch.get_rng_state()
        for rows in ([3, 1, 2, 4], [0, 4, 2, 1]):
            batch = collate([{"sentence": f"anchor {i}", "positive": f"positive {i}"} for i in rows])
            columns = [
                {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}
                for prefix in ("sentence_", "positive_")
            ]
            values.append(loss(columns, None).item())
        assert torch.equal(state, torch.get_rng_state())  # the shuffle leaves dropout's generator alone
    assert (
        read[:4]
        == [["anchor 3", "anchor 1", "anchor 2", "anchor 4"]] * 2
        + [["anchor 0", "anchor 4", "anchor 2", "anchor 1"]] * 2
    )
    assert values[:2] == values[2:]


# ---- the loss


def test_the_module_is_the_function():
    from pycse import fused_distillcse
    from pycse.losses import DistillCSELoss

    generator = torch.Generator().manual_seed(0)
    z1, z2, e1, e2 = (torch.randn(8, width, generator=generator) for width in (6, 6, 4, 9))
    for options in (
        {},
        {"m": 0.3, "shuffle": "expected", "group_p": 0.3, "teacher_weights": [1, 3], "symmetric": True},
    ):
        ours = DistillCSELoss(0.1, **options)(z1, z2, [e1, e2], seed=7)
        theirs = fused_distillcse(z1, z2, [e1, e2], 0.1, **options, seed=7)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    logits = torch.nn.functional.normalize(e1) @ torch.nn.functional.normalize(e1).T
    from_logits, from_embeddings = (
        DistillCSELoss(shuffle="none")(z1, z2, teachers, teacher_logits=t).loss.item()
        for teachers, t in ((None, logits), ([e1], None))
    )
    assert from_logits == pytest.approx(from_embeddings, rel=1e-5)
    learnt = DistillCSELoss(torch.nn.Parameter(torch.tensor(0.05)), m=torch.nn.Parameter(torch.tensor(0.3)))
    learnt(z1, z2, [e1], seed=1).loss.backward()
    assert len(list(learnt.parameters())) == 2 and all(p.grad is not None for p in learnt.parameters())
    for wrong, words in (({"shuffle": "deal"}, "shuffle"), ({"student_temperature": 0.0}, "student_temperature")):
        with pytest.raises(ValueError, match=words):
            DistillCSELoss(**wrong)
