# ruff: noqa: F811 (fixtures are arguments)
"""sparsify: exact shares, each granularity against a slow check, what survives fine-tuning and saving, bad input."""

import copy
import io
import json
import os
import subprocess
import sys

import pytest
from tiny_models import make_model, needs_extras, tiny_model, wide_model  # noqa: F401 (fixtures)

from pycse.sparse import SparseLinear, load, restore, score, sparsify
from pycse.sparse.quota import keep_above, lowest

torch = pytest.importorskip("torch")
nn = torch.nn

SMALL = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 40,
}  # fmt: skip
ARCHITECTURES = ("Bert", "Roberta", "XLMRoberta", "MPNet", "DistilBert")
IDS = torch.randint(5, 50, (6, 9), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "attention_mask": (torch.arange(9) < torch.tensor([[9], [9], [5], [9], [2], [9]])).long()}
CUTS = {
    "weight": {"sparsity": 0.3},
    "n:m": {"n": 2, "m": 4},
    "block": {"sparsity": 0.5, "block": 16},
    "head": {"sparsity": 0.5},
    "neuron": {"sparsity": 0.5},
}


def transformer(architecture="Bert", seed=0):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = getattr(transformers, f"{architecture}Config")(**SMALL)
    if architecture == "DistilBert":
        config.hidden_dim = SMALL["intermediate_size"]
    model = getattr(transformers, f"{architecture}Model")(config).eval()
    for p in model.parameters():  # biases and norms that do something
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def random_scores(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(p.shape, generator=generator) * ("pooler" not in name) for name, p in model.named_parameters()
    }


def plain():
    torch.manual_seed(2)
    return nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 6, bias=False))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def hidden(model):
    return model(**BATCH).last_hidden_state.detach()


def wanted(cut):
    return {"granularity": cut} | CUTS[cut]


# ---- the choice


def test_lowest_is_exact_and_takes_the_first_of_equal_scores():
    values = torch.tensor([2.0, 1.0, 1.0, 3.0, 1.0, -torch.inf])
    for count, gone in ((0, []), (1, [5]), (2, [1, 5]), (3, [1, 2, 5]), (4, [1, 2, 4, 5]), (6, [0, 1, 2, 3, 4, 5])):
        assert (~lowest(values, count)).nonzero().flatten().tolist() == gone


def test_shares_are_exact_and_every_layer_keeps_its_best():
    generator = torch.Generator().manual_seed(0)
    sizes = (7, 3, 12)
    scores = [torch.rand(n, generator=generator) for n in sizes]
    for scope in ("global", "layer"):
        for share in (0.0, 0.05, 0.5, 0.83):
            kept = keep_above(scores, share, scope, least=1)
            counts = [int((~k).sum()) for k in kept]
            if scope == "global":
                assert sum(counts) == int(22 * share + 0.5)
            else:
                assert counts == [int(n * share + 0.5) for n in sizes]
            for s, k in zip(scores, kept):  # no kept score is below a removed one
                assert k.any() and (k.all() or s[~k].max() <= s[k].min())


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_weights(scope):
    model, before = plain(), plain()
    scores = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    report = sparsify(model, scores, 0.3, scope=scope, pattern="dense")
    masks = [model[1].mask, model[3].mask]
    everything = torch.cat([scores[f"{i}.weight"].flatten() for i in (1, 3)])
    assert report.kept + report.removed == everything.numel() == 360 and report.removed == 108
    if scope == "global":
        assert torch.equal(torch.cat([m.flatten() for m in masks]), everything > everything.sort().values[107])
    else:
        assert [int((~m).sum()) for m in masks] == [72, 36]
    for i, mask in zip((1, 3), masks):
        assert torch.equal(model[i].weight, before[i].weight * mask)
    assert torch.equal(model[1].bias, before[1].bias) and torch.equal(model[0].weight, before[0].weight)
    assert report.nonzero_after == report.nonzero_before - 108
    assert report.parameters_before == report.parameters_after == sum(p.numel() for p in before.parameters())
    layer = report.layers[0]
    assert (layer.kept + layer.removed, layer.shape) == (240, (20, 12))
    assert layer.low == scores["1.weight"].min() and layer.high == scores["1.weight"].max()


def test_n_of_m():
    model = plain()
    scores = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    scores["1.weight"][0] = 0.5  # ties: the first of equal scores stay
    report = sparsify(model, scores, granularity="n:m", n=1, m=4)
    assert report.removed == 270 and report.sparsity == 0.75
    for i in (1, 3):
        mask, s = model[i].mask.unflatten(1, (-1, 4)), scores[f"{i}.weight"].unflatten(1, (-1, 4))
        assert (mask.sum(2) == 1).all() and torch.equal(s[mask], s.amax(2).flatten())
    assert torch.equal(model[1].mask[0], torch.tensor([True, False, False, False] * 3))


def test_blocks_and_the_layers_they_do_not_fit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 40), nn.Linear(40, 16))
    scores = random_scores(model)
    report = sparsify(model, scores, 1 / 3, "block", block=16)
    tiles = scores["0.weight"].view(3, 16, 2, 16).mean((1, 3))
    gone = model[0].mask.view(3, 16, 2, 16)
    assert torch.equal(gone.amax((1, 3)), gone.amin((1, 3))) and report.removed == 2 and report.kept == 4
    assert torch.equal(gone.amax((1, 3)), tiles > tiles.flatten().sort().values[1])
    assert [layer.skipped for layer in report.layers] == [False, True, True]
    assert "40 and 48 are not both multiples of the block 16" in report.layers[1].reason
    assert type(model[1]) is nn.Linear
    assert "left as it is" in str(report) and "2 of 6 blocks removed" in str(report)


def test_more_goes_later_and_what_is_gone_stays_gone():
    model = plain()
    sparsify(model, random_scores(model, 1), 0.2)
    before = [model[i].mask.clone() for i in (1, 3)]
    with pytest.raises(ValueError, match="72 are gone already"):
        sparsify(model, random_scores(model, 2), 0.1)
    report = sparsify(model, random_scores(model, 2), 0.5)
    assert report.removed == 180 and int((~model[1].mask).sum() + (~model[3].mask).sum()) == 180
    assert all((model[i].mask <= mask).all() for i, mask in zip((1, 3), before))


def test_names_and_kinds_of_layers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.body, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
            self.other = nn.Linear(5, 5)
            self.attention = nn.MultiheadAttention(5, 1)
            self.head.weight = self.table.weight

    model = Tied()
    scores = random_scores(model)
    scores["other.weight"].zero_()
    report = sparsify(model, scores, 0.4, exclude="nothing*")
    reasons = {layer.name: layer.reason for layer in report.layers if layer.skipped}
    assert "more than one place" in reasons["head"] and "scores are 0" in reasons["other"]
    assert "NonDynamicallyQuantizableLinear" in reasons["attention.out_proj"] and len(reasons) == 3
    assert report.removed == 10
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].bias = model[0].bias
    called = model[2].register_forward_hook(lambda *_: None)
    report = sparsify(model, random_scores(model), 0.5)
    reasons = [layer.reason for layer in report.layers]
    assert "weight or bias is used in more than one place" in reasons[0] and "more than one place" in reasons[1]
    assert "hooks" in reasons[2] and isinstance(model[3], SparseLinear)
    called.remove()
    assert sparsify(model, random_scores(model), 0.6).removed == int(128 * 0.6 + 0.5)
    model = plain()
    report = sparsify(model, random_scores(model), 0.5, include=["1", "3"], exclude=["3"])
    assert report.removed == 120 and isinstance(model[1], SparseLinear) and type(model[3]) is nn.Linear


# ---- heads and neurons


def cut_slowly(model, architecture, scores, cut, sparsity, scope):
    """The same cut by zeroing: a removed head or neuron gives nothing."""
    from pycse.sparse.shrunk_encoders import SHRUNK

    parts = SHRUNK[type(model)][2]
    groups, layers = [], []
    for i in range(3):
        name = f"{parts.stack}.{i}."
        if cut == "neuron":
            up, down = name + parts.up, name + parts.down
            groups.append(
                torch.stack([
                    torch.cat([scores[up + ".weight"][j], scores[up + ".bias"][j : j + 1], scores[down + ".weight"][:, j]])
                    for j in range(64)
                ]).mean(1)
            )  # fmt: skip
            layers.append((down, 1))
        else:
            rows = [name + part for part in (parts.query, parts.key, parts.value)]
            out = name + parts.output
            heads = []
            for h in range(4):
                at = slice(8 * h, 8 * h + 8)
                members = [scores[out + ".weight"][:, at].flatten()]
                members += [scores[row + ".weight"][at].flatten() for row in rows]
                members += [scores[row + ".bias"][at] for row in rows]
                heads.append(torch.cat(members).mean())
            groups.append(torch.stack(heads))
            layers.append((out, 8))
    kept = keep_above(groups, sparsity, scope, least=1)
    with torch.no_grad():
        for (name, size), keep in zip(layers, kept):
            model.get_submodule(name).weight *= keep.repeat_interleave(size)
    return kept


@needs_extras
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("cut, scope", [("head", None), ("neuron", None), ("neuron", "global"), ("head", "layer")])
def test_a_cut_encoder_computes_what_zeroing_would(architecture, cut, scope):
    model = transformer(architecture)
    slow = copy.deepcopy(model)
    scores = random_scores(model)
    report = sparsify(model, scores, 0.4, cut, scope=scope)
    kept = cut_slowly(slow, architecture, scores, cut, 0.4, report.scope)
    groups, layer = (12, 4) if cut == "head" else (192, 64)
    assert report.removed == (3 * int(layer * 0.4 + 0.5) if report.scope == "layer" else int(groups * 0.4 + 0.5))
    assert report.kept == groups - report.removed
    assert [layer.kept for layer in report.layers] == [int(k.sum()) for k in kept]
    torch.testing.assert_close(hidden(model), hidden(slow), rtol=1e-4, atol=1e-5)
    weights = 4 * 8 * 32 + 3 * 8 if cut == "head" else 2 * 32 + 1
    assert report.parameters_before - report.parameters_after == report.removed * weights
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    if (cut, report.scope) == ("neuron", "layer"):
        assert model.config.intermediate_size == 38 if architecture != "DistilBert" else model.config.hidden_dim == 38
        assert type(model).__name__ == f"{architecture}Model"
    else:
        assert type(model).__name__ == f"Shrunk{architecture}Model"


@needs_extras
def test_cuts_follow_one_another(tmp_path):
    model = transformer("MPNet")
    for i, cut in enumerate(("head", "neuron", "head")):
        sparsify(model, random_scores(model, i), 0.3, cut, scope="global")
    assert sum(map(len, model.config.shrunk_heads)) == 6  # 12, less 4, less 2 of 8
    sparsify(model, random_scores(model, 3), 0.3)
    with pytest.raises(ValueError, match="cut heads and neurons first"):
        sparsify(model, random_scores(model, 4), 0.3, "head")
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(hidden(again), hidden(model))
    assert sum(isinstance(module, SparseLinear) for module in again.modules()) == 18


@needs_extras
def test_half_scores_do_not_overflow():
    models = [transformer(), transformer()]
    scores = {name: s * 6e4 for name, s in random_scores(models[0]).items()}
    reports = [sparsify(models[0], scores, 0.5, "head")]
    reports.append(sparsify(models[1], {name: s.half() for name, s in scores.items()}, 0.5, "head"))
    for one, half in zip(*(report.layers for report in reports)):
        assert half.kept == one.kept and half.low == pytest.approx(one.low, rel=1e-3)


@needs_extras
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_of_the_caller(mode, cut):
    model = transformer()
    with mode():
        sparsify(model, random_scores(model), **wanted(cut))
    model(**BATCH).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pooler" not in name)


def hooked():
    model = transformer()
    model.encoder.layer[1].output.dense.register_forward_pre_hook(lambda *_: None)
    return model


def shared():
    model = transformer()
    model.encoder.layer[2] = model.encoder.layer[0]
    return model


# ---- what masks survive


@pytest.mark.parametrize("pattern", ["auto", "dense", "unstructured"])
def test_zeros_stay_zero_in_fine_tuning(pattern):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    sparsify(model, random_scores(model), 0.9, pattern=pattern)
    masks, before = [model[i].mask.clone() for i in (0, 2)], state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (model(torch.randn(5, 16)) - 1).square().sum().backward()
        for i, mask in zip((0, 2), masks):
            assert not model[i].weight.grad[~mask].any() and model[i].weight.grad[mask].any()
        optimizer.step()
    for i, mask in zip((0, 2), masks):
        assert not model[i].weight[~mask].any() and (model[i].weight != before[f"{i}.weight"])[mask].all()
        assert torch.equal(model[i].mask, mask)


def test_masks_survive_state_dict_copies_and_casts():
    model, twin = plain(), plain()
    sparsify(model, random_scores(model), 0.5)
    state_dict = state(model)
    restore(twin, state_dict).load_state_dict(state_dict)
    assert same(state(twin), state_dict) and isinstance(twin[1], SparseLinear)
    other = copy.deepcopy(model).to("cpu", torch.bfloat16)
    assert torch.equal(other[1].mask, model[1].mask) and not other[1].weight[~other[1].mask].any()
    assert other[1].weight.dtype == torch.bfloat16
    for key, value, words in (
        ("7.mask_bits", torch.ones(2, 1, dtype=torch.int32), "mask of no nn.Linear"),
        (
            "1.mask_bits",
            torch.ones(2, 1, dtype=torch.int32),
            r"1.mask_bits must be bits of shape \(20, 1\).* got \(2, 1\)",
        ),
        ("1.mask_bits", torch.ones(20, 12, dtype=torch.bool), "1.mask_bits must be an int32 tensor"),
        ("mask_bits", torch.ones(20, 1, dtype=torch.int32), "a layer alone"),
    ):
        fresh = plain()
        with pytest.raises((TypeError, ValueError), match=words):
            restore(fresh, {"3.mask_bits": torch.ones(6, 1, dtype=torch.int32), key: value})
        assert type(fresh[3]) is nn.Linear


READER = """
import json, os, sys, warnings
folder, texts = sys.argv[1], json.loads(sys.argv[2])
import torch
from sentence_transformers import SentenceTransformer
result = {}
def embed(name, route, make):
    try:
        model = make(os.path.join(folder, name))
    except Exception as error:
        result[name, route] = f"{type(error).__name__}: {error}"
        return
    sparse = sum(type(module).__name__ == "SparseLinear" for module in model.modules())
    result[name, route] = [model.encode(texts).tolist(), sparse]
cuts = [one for one in sorted(os.listdir(folder)) if "." not in one]
for name in cuts:
    embed(name, "plain", lambda path: SentenceTransformer(path, device="cpu"))
    embed(name, "remote", lambda path: SentenceTransformer(path, device="cpu", trust_remote_code=True))
assert "pycse" not in sys.modules
from pycse.sparse import load
for name in cuts:
    embed(name, "load", lambda path: load(path, "cpu"))
print("RESULT" + json.dumps([[*key, value] for key, value in result.items()]))
"""


@needs_extras
def test_saved_encoders_give_equal_embeddings_in_a_fresh_process(tiny_model, tmp_path):
    from sentence_transformers import SentenceTransformer

    texts = ["the red cat", "a ship in the sea and more words", "the sun"]
    saved = {}
    for cut in [*CUTS, "uneven neuron", "tuned"]:
        encoder = SentenceTransformer(tiny_model, device="cpu")
        if cut == "tuned":
            sparsify(encoder, random_scores(encoder), 0.4)
            optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
            encoder(encoder.preprocess(texts))["sentence_embedding"].square().sum().backward()
            optimizer.step()
        elif cut == "uneven neuron":
            sparsify(encoder, random_scores(encoder), 0.5, "neuron", scope="global")
        else:
            sparsify(encoder, random_scores(encoder), **wanted(cut))
        encoder.save_pretrained(str(tmp_path / "models" / cut.replace(":", " of ")))
        saved[cut.replace(":", " of ")] = encoder.encode(texts)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "models"), json.dumps(texts)],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {(cut, route): value for cut, route, value in json.loads(done.stdout.split("RESULT")[1])}
    assert len(found) == 3 * len(saved)
    for (cut, route), value in found.items():
        if route == "plain" and cut in ("head", "uneven neuron"):
            assert value.startswith("ValueError: ") and "trust_remote_code=True" in value
            continue
        embeddings, sparse = value
        torch.testing.assert_close(torch.tensor(embeddings), torch.tensor(saved[cut]), rtol=1e-5, atol=1e-6)
        masked = cut in ("weight", "n of m", "block", "tuned")
        assert (sparse > 0) == (masked and route == "load")


@needs_extras
@pytest.mark.parametrize("cut", CUTS)
def test_encoders_inside_other_models(cut, tmp_path):
    """A model with a head, and a wrapper that has no configuration to note the masks in."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SMALL)).eval()
    wrapped = nn.DataParallel(model)
    sparsify(wrapped, random_scores(wrapped), **wanted(cut))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(hidden(again), hidden(model.bert))
    assert any(isinstance(module, SparseLinear) for module in again.modules()) == (cut not in ("head", "neuron"))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(hidden(load(tmp_path / "again")), hidden(again))


@needs_extras
def test_the_class_of_the_architecture_does_not_make_up_weights(tmp_path):
    from transformers import BertModel

    for cut in ("head", "neuron"):
        model = transformer()
        sparsify(model, random_scores(model), 0.4, cut, scope="global")
        model.save_pretrained(tmp_path / cut)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            BertModel.from_pretrained(tmp_path / cut)
        assert torch.equal(hidden(load(tmp_path / cut)), hidden(model))


@needs_extras
@pytest.mark.parametrize("cut", ["weight", "neuron", "head"])
def test_trainers_load_their_checkpoints(tiny_model, tmp_path, cut):
    """They read a checkpoint with a plain loader and load its state_dict."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    data = Dataset.from_dict({"a": ["red cat", "a ship", "the sun", "dog"], "b": ["cat", "ship", "sun", "a dog"]})

    def train(steps, **more):
        encoder = SentenceTransformer(tiny_model, device="cpu")
        sparsify(encoder, random_scores(encoder), **wanted(cut))
        arguments = Arguments(
            str(tmp_path), max_steps=steps, save_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, learning_rate=0.1
        )  # fmt: skip
        loss = MultipleNegativesRankingLoss(encoder)
        SentenceTransformerTrainer(encoder, arguments, train_dataset=data, loss=loss).train(**more)
        return state(encoder)

    whole, resumed = train(2), train(2, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value)


@needs_extras
def test_an_encoder_of_an_encoder_decoder(tmp_path):
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)).eval()
    sparsify(model, random_scores(model), 0.5)
    model.save_pretrained(tmp_path)
    assert torch.equal(hidden(load(tmp_path)), hidden(model))


@needs_extras
@pytest.mark.parametrize(
    "change",
    [{"shrunk_heads": [[0]]}, {"shrunk_heads": "all"}, {"shrunk_heads": [[0], [], [1]]}, {"shrunk_neurons": [3, 3, 0]}],
    ids=str,
)
def test_configurations_that_somebody_changed(tmp_path, change):
    model = transformer()
    sparsify(model, random_scores(model), 0.5, "head")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(
        ValueError, match=f"{next(iter(change))} in the configuration must be a list .* each of 3 layers"
    ):
        load(tmp_path)


@needs_extras
def test_load_runs_no_code_of_the_folder(tmp_path):
    model = transformer()
    sparsify(model, random_scores(model), 0.5, "head")
    model.save_pretrained(tmp_path)
    (tmp_path / "shrunk_encoders.py").write_text("raise RuntimeError('ran')")
    assert torch.equal(hidden(load(tmp_path)), hidden(model))


def test_load_says_what_it_cannot_load(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"neither modules.json nor config.json"):
        load(tmp_path)


@needs_extras
def test_an_encoder_that_is_not_sparse_loads_as_it_is(tiny_model):
    from sentence_transformers import SentenceTransformer

    encoder = load(tiny_model, "cpu")
    assert (encoder.encode(["the sun"]) == SentenceTransformer(tiny_model, device="cpu").encode(["the sun"])).all()


# ---- scores of whole encoders


@needs_extras
def test_scores_of_a_sentence_transformer_and_of_its_transformer_agree(tiny_model):
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(tiny_model, device="cpu").double()
    texts = [["the red cat", "a ship in the sea", "the sun"], ["old dog", "new trick words"]]
    model = encoder[0].auto_model
    name = next(name for name, module in encoder.named_modules() if module is model)
    whole = score(encoder, texts, seed=1, progress=False)
    tokens = [{k: v for k, v in encoder.preprocess(t).items() if isinstance(v, torch.Tensor)} for t in texts]
    inner = score(model, tokens, seed=1, progress=False)
    for key, value in inner.items():
        torch.testing.assert_close(whole[f"{name}.{key}"], value, rtol=1e-8, atol=1e-12)
    assert not inner["pooler.dense.weight"].any()
    pairs = score(encoder, [(texts[0], ["one red cat", "a boat at sea", "sun"])], seed=1, progress=False)
    assert pairs.keys() == whole.keys()
    report = sparsify(encoder, whole, 0.25)
    assert [layer.name for layer in report.layers if layer.skipped] == [f"{name}.pooler.dense"]


# ---- bad input

BAD = {
    "all": (plain, {"sparsity": 1.0}, r"sparsity must lie in \[0, 1\)"),
    "negative": (plain, {"sparsity": -0.1}, r"sparsity must lie in \[0, 1\)"),
    "nan": (plain, {"sparsity": float("nan")}, "sparsity"),
    "no share": (plain, {"sparsity": None}, "sparsity must be given"),
    "granularity": (plain, {"granularity": "row"}, "granularity must be one of 'weight', 'n:m', 'block', 'head', 'neuron'"),
    "scope": (plain, {"scope": "local"}, "scope"),
    "pattern": (plain, {"pattern": "block8"}, "pattern"),
    "pattern that cannot hold it": (plain, {"pattern": "block16"}, "multiple of the block 16"),
    "n without m": (plain, {"granularity": "n:m", "sparsity": None, "n": 2}, "m must be given"),
    "n above m": (plain, {"granularity": "n:m", "sparsity": None, "n": 5, "m": 4}, "1 <= n <= m"),
    "share against n:m": (plain, {"granularity": "n:m", "n": 2, "m": 4, "sparsity": 0.4}, r"1 - n/m = 0.5"),
    "n of weights": (plain, {"n": 2, "m": 4}, "belong to granularity 'n:m'"),
    "m that divides nothing": (plain, {"granularity": "n:m", "sparsity": None, "n": 3, "m": 7}, "no multiple of m = 7"),
    "block that divides nothing": (plain, {"granularity": "block"}, "multiples of the block 32"),
    "block of nothing": (plain, {"granularity": "block", "block": 0}, "block must be at least 1"),
    "no linear": (lambda: nn.Sequential(nn.Embedding(3, 3), nn.LayerNorm(3)), {}, "nn.Linear"),
    "heads of no encoder": (plain, {"granularity": "head"}, "BertModel, RobertaModel, XLMRobertaModel, MPNetModel"),
    "a layer alone": (lambda: nn.Linear(4, 4), {}, "whole encoder"),
    "one layer twice": (lambda: nn.Sequential(*[nn.Linear(4, 4)] * 2), {}, "more than one place"),
    "everything excluded": (plain, {"exclude": ["*"]}, "excluded"),
    "no module": (lambda: [1], {}, "torch.nn.Module"),
    "too many heads": (transformer, {"granularity": "head", "sparsity": 0.9}, "11 of 12 groups, but each of 3 layers"),
    "one layer of an encoder twice": (shared, {"granularity": "neuron"}, "encoder.layer.0.intermediate.dense are used in more"),
    "hooks": (hooked, {"granularity": "neuron"}, "encoder.layer.1.output.dense has hooks"),
    "share in words": (plain, {"sparsity": "half"}, "sparsity must be a number, got 'half'"),
    "share in a tensor": (plain, {"sparsity": torch.tensor(0.5)}, "sparsity must be a number, got a torch.float32"),
    "names that are none": (plain, {"include": 3}, "include must be patterns of layer names"),
    "include of heads": (transformer, {"granularity": "head", "include": ["*.1.*"]}, "all layers"),
}  # fmt: skip


@needs_extras
@pytest.mark.parametrize("case", BAD)
def test_bad_input_leaves_the_model_as_it_was(case):
    make, options, words = BAD[case]
    model = make()
    scores = random_scores(model) if isinstance(model, nn.Module) else {}
    before = state(model) if isinstance(model, nn.Module) else None
    kinds = list(map(type, model.modules())) if before else None
    with pytest.raises((ValueError, TypeError), match=words):
        sparsify(model, scores, **({"sparsity": 0.5} | options))
    if before:
        assert same(state(model), before) and list(map(type, model.modules())) == kinds


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda s: s | {"other.weight": torch.ones(2)}, "no parameter other.weight"),
        (lambda s: s | {"1.weight": torch.ones(12, 20)}, r"shape \(20, 12\), its score \(12, 20\)"),
        (lambda s: s | {"1.weight": s["1.weight"] * torch.nan}, "finite"),
        (lambda s: s | {"1.weight": torch.ones(20, 12, dtype=torch.long)}, "float tensors"),
        (lambda s: s | {"1.weight": torch.ones(20, 12, device="meta")}, "1.weight is on device meta"),
        (lambda s: {"1.weight": s["1.weight"]}, "3.weight is missing"),
        (lambda s: {}, "there are none"),
        (lambda s: list(s), "mapping"),
    ],
)
def test_scores_of_another_model(spoil, words):
    model = plain()
    before = state(model)
    with pytest.raises((ValueError, TypeError), match=words):
        sparsify(model, spoil(random_scores(model)), 0.5)
    assert same(state(model), before) and type(model[1]) is nn.Linear


# ---- the report


@needs_extras
def test_the_report_is_a_table_a_picture_and_json(tmp_path, monkeypatch):
    from matplotlib.image import imread
    from rich.console import Console

    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    for cut in CUTS:
        model = transformer()
        report = sparsify(model, random_scores(model), **wanted(cut))
        text = str(report)
        assert report.summary() in text and f"{report.removed:,}" in text
        if cut == "weight":  # a reason that layers share stands there once
            assert text.count("dense: for cpu float32 sparse pays below a density of") == 1
            assert text.count("left as it is: all its scores are 0") == 1
        narrow = io.StringIO()
        Console(file=narrow, width=80).print(report)
        assert "…" not in narrow.getvalue()
        assert all(layer.reason for layer in report.layers)
        report.plot(tmp_path / "report.png")
        assert "MPLCONFIGDIR" not in os.environ
        picture = imread(tmp_path / "report.png")
        assert min(picture.shape[:2]) > 150 and picture[..., :3].std() > 0.05
        values = json.loads(json.dumps(report.as_dict()))
        assert values["removed"] == sum(layer["removed"] for layer in values["layers"])
