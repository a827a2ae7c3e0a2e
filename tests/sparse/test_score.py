"""Scores: equal to autograd's, on every kind of encoder, and nothing about the encoder is changed."""

import pytest

from pycse.sparse import score

torch = pytest.importorskip("torch")
nn = torch.nn
F = torch.nn.functional


class Tiny(nn.Module):
    """Embeddings of number lists; a dropout, a LayerNorm, a layer that the embedding does not depend on."""

    def __init__(self, dropout=0.3):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.count = nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros(1))
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(8, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, ids):
        self.calls = self.calls + 1
        return self.down(self.dropout(self.count(self.norm(torch.tanh(self.up(self.table(ids).mean(1)))))))


def pooled(output, batch):
    return output


def encoder(dropout=0.3):
    torch.manual_seed(3)
    return Tiny(dropout).double()


def batches(count=3, rows=5):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(11, (rows, 4), generator=generator) for _ in range(count)]


def losses(x, y):
    """The two losses as their formulas stand."""
    x, y = F.normalize(x), F.normalize(y)
    d2 = torch.stack([(x[i] - x[j]).square().sum() for i in range(len(x)) for j in range(i)])
    return (x - y).square().sum(1).mean(), (-2 * d2).exp().mean().log()


def expected(model, views, balance, means):
    """Scores the slow way: backward() for each loss and batch."""
    totals = []
    for which in range(2):
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for view in views():
            model.zero_grad()
            losses(*view)[which].backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    total[name] += (p.detach() * p.grad).abs()
        totals.append(total)
    result = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for share, total in zip((balance, 1 - balance), totals):
        everywhere = torch.cat([t.flatten() for t in total.values()]).mean()
        for name, t in total.items():
            mean = everywhere if means == "global" else t.mean()
            result[name] += share * t / mean if mean else 0
    return result


@pytest.mark.parametrize("means", ["global", "layer"])
@pytest.mark.parametrize("balance", [0.5, 0.0, 1.0, 0.3])
@pytest.mark.parametrize("positives", ["dropout", "pairs"])
def test_scores_equal_autograds(positives, balance, means):
    model, other = encoder(), encoder()
    data = batches()
    pairs = list(zip(data, batches(6)[3:]))

    def views():
        if positives == "pairs":
            other.eval()
            yield from ((other(a), other(b)) for a, b in pairs)
        else:
            other.train()
            torch.manual_seed(7)
            yield from ((other(a), other(a)) for a in data)

    found = score(
        model, data if positives == "dropout" else pairs, balance, means, pooling=pooled, seed=7, progress=False
    )
    wanted = expected(other, views, balance, means)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-8, atol=1e-12)
    assert not found["unused.weight"].any() and found["down.weight"].any()


def state_of(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [p.detach().clone() for p in model.parameters()],
        [b.clone() for b in model.buffers()],
        torch.get_rng_state(),
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_encoder_is_left_as_it_was(fails, training):
    model = encoder().train(training)
    model.norm.eval()
    model.up.weight.requires_grad_(False)
    model.down(torch.ones(1, 8).double()).sum().backward()

    def data():
        yield from batches()
        if fails:
            raise RuntimeError("no more")

    before = state_of(model)
    with torch.no_grad():
        if fails:
            with pytest.raises(RuntimeError, match="no more"):
                score(model, data(), pooling=pooled, progress=False)
        else:
            score(model, data(), pooling=pooled, seed=1, progress=False)
        assert not torch.is_grad_enabled()
    for a, b in zip(before, state_of(model)):
        assert len(a) == len(b)
        assert (
            torch.equal(a, b)
            if isinstance(a, torch.Tensor)
            else all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b))
        )


def test_batches_are_read_one_after_the_other():
    live = []

    def data():
        for batch in batches(4):
            live.append(1)
            yield batch

    seen = []
    model = encoder()
    model.register_forward_hook(lambda *_: seen.append(len(live)))
    score(model, data(), pooling=pooled, progress=False)
    assert seen == [1, 1, 2, 2, 3, 3, 4, 4]


def test_modes_of_the_caller():
    data = batches()
    wanted = score(encoder(), data, pooling=pooled, seed=1, progress=False)
    model = encoder()
    with torch.inference_mode():
        data = [batch.clone() for batch in data]
        found = score(model, data, pooling=pooled, seed=1, progress=False)
        with pytest.raises(ValueError, match="outside torch.inference_mode"):
            score(encoder(), data, pooling=pooled)
    with torch.autocast("cpu", torch.bfloat16):
        low = score(encoder().float(), data, pooling=pooled, seed=1, progress=False)
    for name, value in wanted.items():
        assert torch.equal(found[name], value) and not found[name].is_inference()
        assert low[name].dtype == torch.float32 and low[name].isfinite().all()


def test_gradient_checkpointing():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertModel(config)
    wanted = score(model, batches(), seed=1, progress=False)
    model.gradient_checkpointing_enable()
    found = score(model, batches(), seed=1, progress=False)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_parameters_that_are_no_floats():
    model = encoder()
    model.steps = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    found = score(model, batches(), pooling=pooled, seed=1, progress=False)
    assert "steps" not in found and found.keys() == score(encoder(), batches(), pooling=pooled, progress=False).keys()


def test_half_precision_accumulates_in_single():
    model = encoder().bfloat16()
    found = score(model, batches(), pooling=pooled, seed=1, progress=False)
    assert all(s.dtype == torch.float32 and s.isfinite().all() and (s >= 0).all() for s in found.values())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


BAD = {
    "no dropout": (lambda: (encoder(0.0), batches()), {}, ValueError, "give pairs"),
    "one row": (lambda: (encoder(), batches(rows=1)), {}, ValueError, "at least 2 rows"),
    "no batch": (lambda: (encoder(), []), {}, ValueError, "at least one batch"),
    "ragged pair": (lambda: (encoder(), [(batches()[0], batches(rows=4)[0])]), {}, ValueError, "as many rows"),
    "equal pair": (lambda: (encoder(), [(batches()[0],) * 2]), {}, ValueError, "changes alignment"),
    "balance": (lambda: (encoder(), batches()), {"balance": 1.5}, ValueError, "balance"),
    "balance is text": (lambda: (encoder(), batches()), {"balance": "half"}, TypeError, "balance"),
    "means": (lambda: (encoder(), batches()), {"means": "median"}, ValueError, "means"),
    "no pooling": (lambda: (encoder(), batches()), {"pooling": None}, TypeError, "pooling must be given"),
    "pooling of other shape": (
        lambda: (encoder(), batches()), {"pooling": lambda o, b: o.sum()}, TypeError, r"embeddings \(B, D\)",
    ),
    "text": (lambda: (encoder(), [["a", "b"]]), {}, TypeError, "tokenized"),
    "a batch alone": (lambda: (encoder(), {"input_ids": batches()[0]}), {}, TypeError, "put one batch in a list"),
    "a tensor alone": (lambda: (encoder(), batches()[0]), {}, TypeError, "got a Tensor; put one batch in a list"),
    "nothing to read": (lambda: (encoder(), 3), {}, TypeError, "batches must be an iterable of batches, got a int"),
    "seed": (lambda: (encoder(), batches()), {"seed": 2**64}, ValueError, "seed must fit 64 bits"),
    "no module": (lambda: (3, batches()), {}, TypeError, "torch.nn.Module"),
    "no parameters": (lambda: (nn.Identity(), batches()), {}, ValueError, "floating-point parameters"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, options, error, words = BAD[case]
    model, data = make()
    before = state_of(model) if isinstance(model, Tiny) else None
    # BatchNorm refuses a single row in training mode before we can
    if case == "one row":
        model.count = nn.Identity()
        before = state_of(model)
    with pytest.raises(error, match=words):
        score(model, data, **({"pooling": pooled, "progress": False} | options))
    if before:
        after = state_of(model)
        assert before[0] == after[0] and before[1] == after[1] and torch.equal(before[5], after[5])
