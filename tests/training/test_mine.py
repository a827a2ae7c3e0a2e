# ruff: noqa: F811 (the fixture is an argument)
"""`pycse mine` and `pycse encode`: what they write, and that they never write over anything."""

import os
import threading
from collections import Counter

import numpy as np
import pytest
from test_cli import SENTENCES, files, pycse
from tiny_models import needs_extras, tiny_model  # noqa: F401 (a fixture)

from pycse.training.data import Text, read_train_file
from pycse.training.errors import UserError
from pycse.training.mine import Mining

torch = pytest.importorskip("torch")


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES) + "\n")
    # Every positive is the next row's anchor, so every anchor but the first is among the candidates.
    (tmp_path / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in zip(SENTENCES, SENTENCES[1:])))
    (tmp_path / "corpus.jsonl").write_text("".join(f'["far {s}\\taway"]\n' for s in SENTENCES))
    (tmp_path / "keep.tsv").write_text("keep")
    (tmp_path / "keep.npy").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plainly(encoder, pairs, candidates, count, skip):
    """The nearest candidates that are neither the anchor nor one of its positives, without the library."""
    own = {anchor: {anchor} for anchor, _ in pairs}
    for anchor, positive in pairs:
        own[anchor].add(positive)
    candidates = list(dict.fromkeys(candidates))
    z = torch.nn.functional.normalize(torch.from_numpy(encoder.encode(candidates)))
    rows = []
    for anchor, positive in pairs:
        cosines = z @ torch.nn.functional.normalize(torch.from_numpy(encoder.encode([anchor]))).T
        order = [candidates[k] for k in cosines[:, 0].argsort(descending=True) if candidates[k] not in own[anchor]]
        rows.append((anchor, positive, *order[skip : skip + count]))
    return rows


@needs_extras
@pytest.mark.parametrize("source, out", [("text.txt", "out.tsv"), ("pairs.tsv", "out.jsonl"), ("pairs.tsv", "out.csv")])
def test_mined_negatives_against_plain_code(place, tiny_model, source, out):
    from sentence_transformers import SentenceTransformer

    code, stdout, stderr = pycse(
        "mine", source, "--model", tiny_model, "--out", out, "--negatives", 2, "--skip", 1, "--device", "cpu"
    )
    assert code == 0, stderr
    pairs = [(row[0], row[-1]) for row in read_train_file(source).rows]
    encoder = SentenceTransformer(tiny_model, device="cpu")
    wanted = plainly(encoder, pairs, [positive for _, positive in pairs], 2, 1)
    mined = read_train_file(out)  # as pycse train does
    assert mined.columns == ("sentence", "positive", "negative", "negative_2")
    assert sorted(mined.rows) == sorted(wanted)
    assert f"{len(pairs)} rows with 2 hard negatives each" in stdout


@needs_extras
def test_margins_sampling_and_a_corpus(place, tiny_model):
    from pycse.training.encoder import load_encoder
    from pycse.training.mine import mine

    encoder = load_encoder(tiny_model, "cpu")
    text = read_train_file("pairs.tsv")
    corpus = [f"far {sentence} away" for sentence in SENTENCES]
    found = mine(encoder, text, Mining(1, margin=0.01), corpus=corpus)
    assert found and any(row[2] in corpus for row in found)
    for anchor, positive, negative in found:
        z = encoder.encode([anchor, positive, negative], convert_to_tensor=True, normalize_embeddings=True)
        assert z[0] @ z[2] <= z[0] @ z[1] - 0.01 + 1e-5
    with pytest.raises(UserError, match="pairs.tsv: no row has 1 texts near it"):
        mine(encoder, text, Mining(1, most=-0.999))
    one, same, other = (mine(encoder, text, Mining(1, depth=12, sampling="random"), seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    prompted = mine(encoder, Text("", text.rows, Counter()), Mining(1), prompts=("zzz 999: ", None))
    assert prompted != mine(encoder, text, Mining(1))


@needs_extras
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["mine", "text.txt", "--out", "keep.tsv"], "keep.tsv exists and is not overwritten"),
        (["mine", "text.txt", "--out", "a.txt"], "give a name that ends with .tsv or .csv or .jsonl"),
        (["mine", "text.txt", "--out", "no/a.tsv"], "there is no folder no"),
        (["mine", "absent.txt", "--out", "a.tsv"], "no such file: absent.txt"),
        (["mine", "text.txt", "--out", "a.tsv", "--negatives", "0"], "--negatives is 0"),
        (["mine", "text.txt", "--out", "a.tsv", "--depth", "1", "--skip", "1"], "--depth is 1; it must be at least"),
        (["mine", "text.txt", "--out", "a.tsv", "--sampling", "all"], "--sampling all: unknown"),
        (["mine", "text.txt", "--out", "a.tsv", "--relative-margin", "nan"], "--relative-margin is nan"),
        (["mine", "text.txt", "--out", "a.tsv", "--negatives", "18"], "no row has 18 texts near it"),
        (["mine", "text.txt", "--out", "a.tsv", "--corpus", "corpus.jsonl"], "holds a tab"),
        (["mine", "text.txt", "--out", "a.tsv", "--corpus", "pairs.tsv"], "has 2 columns; give one text a line"),
        (["encode", "MODEL", "text.txt", "--out", "keep.npy"], "keep.npy exists"),  # a dangling link is a name too
        (["encode", "MODEL", "text.txt", "--out", "a.txt"], "ends with .npy"),
        (["encode", "MODEL", "absent", "--out", "a.npy"], "no such file: absent"),
        (["encode", "MODEL", "text.txt", "--out", "a.npy", "--truncate-dim", "33"], "have 32 features"),
        (["encode", "MODEL", "text.txt", "--out", "a.npy", "--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(place, tiny_model, arguments, words):
    before = files(place)
    model = ["--model", tiny_model] if arguments[0] == "mine" else []
    code, _, stderr = pycse(*[tiny_model if word == "MODEL" else word for word in arguments], *model, "--device", "cpu")
    assert code == 2 and words in stderr and stderr.count("\n") == 1, stderr
    assert files(place) == before


@needs_extras
def test_embeddings_of_lines(place, tiny_model, monkeypatch):
    from sentence_transformers import SentenceTransformer

    from pycse.training import embed

    monkeypatch.setattr(embed, "CHUNK", 2)  # several chunks, the last one not full
    lines = [*SENTENCES[:7], "", "  the sea"]
    (place / "lines.txt").write_text("\n".join(lines) + "\n")
    encoder = SentenceTransformer(tiny_model, device="cpu")
    for name, more, options in (
        ("a.npy", (), {}),
        ("b.npy", ("--normalize", "--truncate-dim", 8), {"normalize_embeddings": True, "truncate_dim": 8}),
        ("c.npy", ("--prompt", "old: "), {"prompt": "old: "}),
    ):
        code, stdout, stderr = pycse(
            "encode", tiny_model, "lines.txt", "--out", name, "--device", "cpu", "--batch-size", 2, *more
        )
        assert code == 0, stderr
        found = np.load(name, mmap_mode="r")
        assert found.dtype == np.float32 and len(found) == 9 and "9 lines" in stdout
        np.testing.assert_allclose(found, encoder.encode(lines, **options), atol=1e-5)
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_a_header_has_room_for_all_rows():
    from pycse.training.embed import header

    assert len(header(0, 384)) == len(header(10**15, 384))


def test_a_name_that_is_taken_meanwhile(tmp_path):
    from pycse.training.new_file import check_new, new_file

    path = check_new("out", tmp_path / "a.npy")
    with pytest.raises(UserError, match="exists by now"), new_file("out", path) as file:
        file.write(b"new")
        path.write_bytes(b"another's")
    with pytest.raises(KeyError), new_file("out", tmp_path / "b.npy") as file:
        raise KeyError
    assert files(tmp_path) == {path.relative_to(tmp_path): b"another's"}


@needs_extras
def test_lines_of_a_pipe(place, tiny_model):
    read, write = os.pipe()
    threading.Thread(target=lambda: (os.write(write, b"a cat\nthe sea\n"), os.close(write))).start()
    code, _, stderr = pycse("encode", tiny_model, f"/dev/fd/{read}", "--out", "p.npy", "--device", "cpu")
    os.close(read)
    assert code == 0, stderr
    assert np.load("p.npy").shape == (2, 32)
