"""Sparse layers and sparsified encoders in torch.jit.trace, torch.export, ONNX, torch.fx, and compiled after a
write."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from sparse_layers import NAMES, layer
from torch import nn

from pycse.sparse import SparseLinear, masked_linear, sparsify

PATTERNS = ["unstructured", "block16", "dense"]
SIDES = {name: side for side, name in NAMES.items()}


def written(pattern, **options):
    """A layer to whose removed weights somebody wrote, the same dense, and x."""
    _, sparse = layer(32, 64, SIDES.get(pattern, 1), 0.4, pattern=pattern, **options)
    dense = sparse.densify()
    dict(sparse.named_parameters())["weight"].data.add_(~sparse.mask)
    return sparse, dense, torch.randn(5, 64)


def stack(pattern):
    first, dense, x = written(pattern)
    second = layer(16, 32, SIDES.get(pattern, 1), 0.4, pattern=pattern)[1]
    return nn.Sequential(first, nn.ReLU(), second), nn.Sequential(dense, nn.ReLU(), second.densify()), x


def sparse_bert(granularity):
    """(a sparsified BertModel that gives its hidden states, input)."""
    transformers = pytest.importorskip("transformers")

    class Encoder(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    scores = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    pattern = "unstructured" if granularity == "weight" else "block16"
    sparsify(model, scores, 0.5, granularity, block=16, pattern=pattern)
    assert {m.chosen for m in model.modules() if isinstance(m, SparseLinear)} == {pattern}
    ids = torch.randint(0, 50, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return Encoder(model), (ids, mask)


def run_onnx(module, args, path, dynamo):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    names = [f"input{k}" for k in range(len(args))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(module, args, path, input_names=names, dynamo=dynamo)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: a.numpy() for name, a in zip(names, args)})[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_traced(pattern):
    for sparse, dense, x in (written(pattern), stack(pattern)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)
            traced = torch.jit.trace(sparse, (x,))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        loaded = torch.jit.load(io.BytesIO(file.getvalue()))
        for given in (x, torch.randn(9, 64)):
            torch.testing.assert_close(loaded(given), dense(given))
        assert "pycse::" not in str(loaded.inlined_graph)
    mask, weight = sparse[0].mask, torch.randn(32, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(lambda x, w: masked_linear(x, w, mask), (x, weight))
    torch.testing.assert_close(traced(2 * x, weight + 1), F.linear(2 * x, (weight + 1) * mask))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_exported(pattern, strict, tmp_path):
    sparse, dense, x = stack(pattern)
    program = torch.export.export(sparse, (x,), strict=strict)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2")
    torch.testing.assert_close(loaded.module()(3 * x), dense(3 * x))
    if not strict or hasattr(torch.compiler, "is_exporting"):
        assert "pycse." not in str(loaded.graph)  # it runs where pycse is not installed


@pytest.mark.parametrize("dynamo", [False, True], ids=["legacy", "dynamo"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_onnx(pattern, dynamo, tmp_path):
    sparse, dense, x = stack(pattern)
    torch.testing.assert_close(
        run_onnx(sparse.eval(), (x,), tmp_path / "m.onnx", dynamo), dense(x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("granularity", ["weight", "block"])
def test_encoders(granularity, tmp_path):
    encoder, args = sparse_bert(granularity)
    truth = encoder(*args).detach()
    program = torch.export.export(encoder, args)
    torch.export.save(program, tmp_path / "encoder.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "encoder.pt2").module()(*args), truth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, which asks for sizes
        traced = torch.jit.trace(encoder, args)
        torch.testing.assert_close(traced(*args), truth)
        for dynamo in (False, True):
            y = run_onnx(encoder, args, tmp_path / "m.onnx", dynamo)
            torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_fx(pattern):
    sparse, dense, x = stack(pattern)
    graph = torch.fx.symbolic_trace(sparse)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    assert isinstance(graph.get_submodule("0"), SparseLinear)
    torch.testing.assert_close(graph(x), dense(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(sparse[0])(x), dense[0](x))
    mask = sparse[0].mask
    function = torch.fx.symbolic_trace(lambda x, w: masked_linear(x, w, mask).relu())
    assert [node.target for node in function.graph.nodes if node.op == "call_function"] == [masked_linear]
    torch.testing.assert_close(function(x, dense[0].weight), F.linear(x, dense[0].weight).relu())


@pytest.mark.clean_memory
@pytest.mark.parametrize("pattern", PATTERNS)
def test_compiled_after_a_write(pattern):
    """Merged adapters, momentum, masks that another call derived: as in eager mode, and without another compilation."""
    torch._dynamo.reset()
    sparse, dense, x = written(pattern)
    weight = dict(sparse.named_parameters())["weight"]
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            truth = F.linear(x, weight.masked_fill(~sparse.mask, 0), sparse.bias)
            y = compiled(x)
            torch.testing.assert_close(y, truth)
            ours, wanted = (torch.autograd.grad(t.sin().sum(), weight)[0] for t in (y, truth))
            torch.testing.assert_close(ours, wanted)
            assert not ours[~sparse.mask].any()
            weight.data.add_(1)
    program = torch.export.export(sparse, (x,))
    weight.data.add_(~sparse.mask)
    torch.testing.assert_close(program.module()(x), F.linear(x, sparse.densify().weight, sparse.bias))


def test_a_compiled_layer_still_runs_its_kernels():
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    for pattern in ("unstructured", "block16"):
        torch._dynamo.reset()
        sparse, dense, x = written(pattern)
        seen.clear()
        torch.testing.assert_close(torch.compile(sparse, backend=backend)(x), dense(x))
        assert "pycse.sparse_linear.default" in seen


def sparse_transformer(pattern, nested):
    """A sparse nn.TransformerEncoder whose removed weights were written to, and the same dense."""
    torch.manual_seed(0)
    made = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    sparse = nn.TransformerEncoder(made, 2, enable_nested_tensor=nested)
    dense = copy.deepcopy(sparse)
    for s, d in zip(sparse.layers, dense.layers):
        for name in ("linear1", "linear2", "self_attn.out_proj"):
            place, child = s.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            linear = getattr(place, child)
            kept = layer(linear.out_features, linear.in_features, SIDES.get(pattern, 1), 0.5)[1].mask
            setattr(place, child, SparseLinear.from_dense(linear, kept, pattern))
            setattr(d.get_submodule(name.rpartition(".")[0]), child, getattr(place, child).densify())
    return sparse, dense


def write(module):
    for m in module.modules():
        if isinstance(m, SparseLinear):
            dict(m.named_parameters())["weight"].data.add_(~m.mask)


@pytest.mark.clean_memory
@pytest.mark.parametrize(
    "pattern, way", [*((p, w) for p in PATTERNS for w in ("eager", "nested")), ("block16", "compiled")]
)
def test_modules_that_read_the_weight_of_a_child(pattern, way):
    """nn.TransformerEncoder's fast path and nn.MultiheadAttention take ``.weight`` and call nothing."""
    torch._dynamo.reset()
    sparse, dense = sparse_transformer(pattern, way == "nested")
    x, padding = torch.randn(3, 7, 64), torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 4:] = True
    options = {"src_key_padding_mask": padding} if way == "nested" else {}
    call = torch.compile(sparse, backend="aot_eager") if way == "compiled" else sparse
    for mode in (sparse.eval, sparse.train):
        mode(), dense.train(sparse.training)
        for _ in range(2):
            write(sparse)
            with torch.no_grad():
                torch.testing.assert_close(call(x, **options), dense(x, **options))
        write(sparse)
        given = x.clone().requires_grad_()
        ours, truth = (torch.autograd.grad(m(given, **options).sin().sum(), given)[0] for m in (call, dense))
        torch.testing.assert_close(ours, truth)
