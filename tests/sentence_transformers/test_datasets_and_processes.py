"""Several datasets and several processes: which batches meet in a step."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from columns_of_texts import needs_extras
from two_views import PAIRS, RATE, TwoViews, assert_same_weights, step_of_a_loop, step_of_transformers

from pycse import fused_infonce

pytestmark = [needs_extras, pytest.mark.filterwarnings("ignore")]
st = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")

ORDERS = ["proportional", "round_robin"]
B = 4
ROWS = {"even": 24, "uneven": 31, "small": 12}  # 6, 7 and 3 full batches: of two processes' groups 3, 3 and 1


def samplers(order, W, monkeypatch, rows=ROWS, drop_last=True, kind=None, wrapped=True):
    """What the trainer makes of datasets of numbered rows: a batch sampler of W processes, and one of the library's."""
    import accelerate
    from sentence_transformers.base import sampler
    from torch.utils.data import ConcatDataset, RandomSampler

    import pycse.sentence_transformers as ours

    monkeypatch.setattr(accelerate, "PartialState", lambda: SimpleNamespace(num_processes=W))
    generator = torch.Generator()
    datasets = [[{"text": f"{name} {i}"} for i in range(n)] for name, n in rows.items()]
    options = {"batch_size": B, "drop_last": drop_last, "generator": generator, "seed": 5}
    made = [
        sampler.DefaultBatchSampler(RandomSampler(d, generator=generator), **options)
        if kind is None
        else kind(d, **options)
        for d in datasets
    ]
    library = {"proportional": sampler.ProportionalBatchSampler, "round_robin": sampler.RoundRobinBatchSampler}
    make = ours.same_dataset_batches(order) if wrapped else library[order]
    return make(ConcatDataset(datasets), batch_samplers=made, generator=generator, seed=5)


def dataset_of(batch, rows=ROWS):
    """Its number, or None where a batch has rows of several."""
    ends = torch.tensor([*rows.values()]).cumsum(0)
    found = set(torch.searchsorted(ends, torch.tensor(batch), right=True).tolist())
    return found.pop() if len(found) == 1 else None


def dealt(sampler, W):
    """Batches that accelerate gives each process, by step."""
    from accelerate.data_loader import BatchSamplerShard

    shards = [BatchSamplerShard(sampler, W, rank, even_batches=False) for rank in range(W)]
    steps = [list(shard) for shard in shards]
    assert [len(one) for one in steps] == [len(shard) for shard in shards] and len({*map(len, steps)}) == 1
    return list(zip(*steps))


@pytest.mark.parametrize("order", ORDERS)
def test_one_process_has_the_librarys_sampler(order, monkeypatch):
    for drop_last in (True, False):
        ours = samplers(order, 1, monkeypatch, drop_last=drop_last)
        theirs = samplers(order, 1, monkeypatch, drop_last=drop_last, wrapped=False)
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for epoch in range(2):
            ours.set_epoch(epoch), theirs.set_epoch(epoch)
            assert list(ours) == list(theirs)


@pytest.mark.parametrize("W", [2, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_a_step_has_one_dataset(order, W, monkeypatch):
    steps = dealt(samplers(order, W, monkeypatch), W)
    kinds = [{dataset_of(batch) for batch in step} for step in steps]
    assert all(len(kind) == 1 and None not in kind for kind in kinds)
    every = [row for step in steps for batch in step for row in batch]
    assert len(every) == len(set(every))
    groups = [n // B // W for n in ROWS.values()]
    expected = groups if order == "proportional" else [min(groups)] * len(groups)
    counts = Counter(kind.pop() for kind in kinds)
    assert [counts[k] for k in range(len(ROWS))] == expected

    mixed = dealt(samplers(order, W, monkeypatch, wrapped=False), W)
    assert any(len({dataset_of(batch) for batch in step}) > 1 for step in mixed)


def test_orders_differ(monkeypatch):
    rows = {"a": 40, "b": 40}
    turns = [[dataset_of(batch, rows) for batch in samplers(order, 2, monkeypatch, rows)] for order in ORDERS]
    assert turns[1] == [0, 0, 1, 1] * 5
    assert turns[0] != turns[1] and sorted(turns[0]) == sorted(turns[1])
    from sentence_transformers.base.sampler import MultiDatasetBatchSamplers

    member = samplers(MultiDatasetBatchSamplers.ROUND_ROBIN, 2, monkeypatch, rows)
    assert [dataset_of(batch, rows) for batch in member] == turns[1]


@pytest.mark.parametrize("order", ORDERS)
def test_epochs_and_lengths(order, monkeypatch):
    one, again = (samplers(order, 2, monkeypatch) for _ in range(2))
    first = list(one)
    assert first == list(one) == list(again) and len(first) == len(one)
    one.set_epoch(1)
    second = list(one)
    assert first != second and len(second) == len(one)
    again.dataset.set_epoch(1)  # as accelerate does where training resumes amid an epoch
    assert list(again) == second
    pickle.loads(pickle.dumps(again.dataset))  # as for spawned workers


def test_batch_samplers_that_fall_short(monkeypatch):
    """Few different texts: fewer batches come than NoDuplicatesBatchSampler's length says, and no step is mixed for it."""
    from datasets import Dataset
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

    def same(rows, **options):
        texts = ["like others" if "uneven" in row["text"] and i % 8 else row["text"] for i, row in enumerate(rows)]
        return NoDuplicatesBatchSampler(Dataset.from_dict({"text": texts}), **options)

    sampler = samplers("proportional", 3, monkeypatch, kind=same)
    batches = list(sampler)
    assert len(batches) < len(sampler) and len(batches) % 3 == 0
    kinds = [dataset_of(batch) for batch in batches]
    assert None not in kinds and all(len({*kinds[k : k + 3]}) == 1 for k in range(0, len(kinds), 3))


def test_what_is_refused(monkeypatch):
    import pycse.sentence_transformers as ours

    with pytest.raises(ValueError, match="order must be one of 'proportional', 'round_robin', got 'random'"):
        ours.same_dataset_batches("random")
    with pytest.raises(ValueError, match=r"at least 4 full batches of 4 rows, one a process, got \[6, 7, 3\] batches"):
        samplers("proportional", 4, monkeypatch)
    with pytest.raises(ValueError, match="dataloader_drop_last must be True with 2 processes.*got False"):
        samplers("proportional", 2, monkeypatch, drop_last=False)
    sizes = iter((4, 4, 2))

    def of_a_size(rows, batch_size, **options):
        from sentence_transformers.base.sampler import DefaultBatchSampler

        return DefaultBatchSampler(range(len(rows)), batch_size=next(sizes), **options)

    with pytest.raises(ValueError, match=r"batches of one size with 2 processes, got \[4, 4, 2\]"):
        samplers("proportional", 2, monkeypatch, kind=of_a_size)
    assert pickle.loads(pickle.dumps(ours.same_dataset_batches("round_robin"))).args == ("round_robin",)


class Seen(torch.nn.Module):
    """A loss that writes down whose rows it is given."""

    def __init__(self, name, loss, steps):
        super().__init__()
        self.name, self.loss, self.steps = name, loss, steps

    def forward(self, sentence_features, labels=None):
        columns = list(sentence_features)
        mask = columns[0]["attention_mask"].bool()
        rows = [ids[own].tolist() for ids, own in zip(columns[0]["input_ids"], mask)]
        self.steps.append((self.name, rows))
        return self.loss(columns, labels)


def steps_of_this_process(folder, tiny_model, sampler, resume=False, **arguments):
    """(dataset, rows) of every step that sentence-transformers' trainer makes here."""
    from datasets import Dataset, DatasetDict
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    from pycse.sentence_transformers import InfoNCELoss

    model, steps = st.SentenceTransformer(tiny_model, device="cpu"), []
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=B, use_cpu=True, ddp_backend="gloo",
        multi_dataset_batch_sampler=sampler, report_to="none", disable_tqdm=True, seed=3, **{"save_strategy": "no", **arguments},
    )  # fmt: skip
    texts = {name: [f"{name} {i}" for i in range(n)] for name, n in ROWS.items()}
    data = DatasetDict({name: Dataset.from_dict({"anchor": t, "positive": t}) for name, t in texts.items()})
    losses = {name: Seen(name, InfoNCELoss(model), steps) for name in ROWS}
    SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=losses).train(
        resume_from_checkpoint=resume or None
    )
    return steps


# Trainer of transformers, two processes: whether the batch has labels, average_tokens_across_devices.
STEPS = {"without": (False, True), "labels": (True, False), "averaged": (True, True)}


def rows_of_both():
    """z1, z2 of 2 x 4 rows before a weight that both processes train."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 4, 8, generator=g), torch.randn(8, 6, generator=g).requires_grad_()


def gathered_by_hand():
    """The gradient, as DDP averages it, of docs/sentence_transformers.md's loss of keys that Lightning gathers: what its
    all_gather returns is this stack."""
    import torch.distributed as dist
    from torch.distributed.nn.functional import all_gather

    (rows, weight), rank = rows_of_both(), dist.get_rank()
    z1, z2 = rows[:, rank] @ weight
    keys = torch.stack(all_gather(z2)).flatten(0, -2)
    own = rank * len(z2) + torch.arange(len(z2))
    fused_infonce(z1, keys, temperature=0.05, positives=own).backward()
    dist.all_reduce(weight.grad)
    return (weight.grad / dist.get_world_size()).tolist()


def worker(folder, tiny_model):
    """One of two processes."""
    from pycse.sentence_transformers import same_dataset_batches

    torch.set_num_threads(1)
    found = {"library": steps_of_this_process(folder, tiny_model, "proportional")}
    for order in ORDERS:
        save = {"save_strategy": "steps", "save_steps": 9} if order == "proportional" else {}
        found[order] = steps_of_this_process(folder, tiny_model, same_dataset_batches(order), **save)
    found["resumed"] = steps_of_this_process(
        folder, tiny_model, same_dataset_batches(), resume=f"{folder}/checkpoint-9", dataloader_num_workers=1
    )
    for case, (labels, average) in STEPS.items():
        options = {"per_device_train_batch_size": 4, "average_tokens_across_devices": average, "ddp_backend": "gloo"}
        trained, found[case] = step_of_transformers(tiny_model, folder, labels, **options)
        if os.environ["RANK"] == "0":
            torch.save(trained.state_dict(), f"{folder}/{case}")
    found["gathered"] = gathered_by_hand()
    with open(f"{folder}/{os.environ['RANK']}.json", "w") as file:
        json.dump(found, file)
    sys.stdout.flush()
    os._exit(0)  # PyTorch's own threads may be alive still


def two_processes(code, tmp_path):
    """Runs code in two processes that find each other, and returns the JSON that they left."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    with logs[0].open("w") as first, logs[1].open("w") as second:
        both = [
            subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", code],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate((first, second))
        ]
    end = time.monotonic() + 120
    try:
        for p in both:
            p.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # what they printed says more
    finally:
        for p in both:
            p.kill()
            p.wait()
    assert [p.returncode for p in both] == [0, 0], "\n".join(log.read_text() for log in logs)
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names the loopback interface as Linux does")
def test_two_processes_of_trainers(tiny_model, tmp_path):
    code = f"import test_datasets_and_processes as t; t.worker({str(tmp_path)!r}, {tiny_model!r})"
    first, second = two_processes(code, tmp_path)
    # docs/sentence_transformers.md: same_dataset_batches
    for run, epoch in (("library", 8), ("proportional", 7), ("round_robin", 3)):
        assert len(first[run]) == len(second[run]) == 2 * epoch
        for e in range(2):
            steps = [found[run][e * epoch : (e + 1) * epoch] for found in (first, second)]
            rows = [tuple(row) for step in chain(*steps) for row in step[1]]
            assert len(rows) == len(set(rows)) == 2 * epoch * B
            together = [a[0] == b[0] for a, b in zip(*steps)]
            assert all(together) != (run == "library")
    for found in (first, second):
        assert found["proportional"][:7] != found["proportional"][7:]
        assert found["resumed"] == found["proportional"][9:]

    # transformers' own Trainer: the step of the mean over processes, but times their number with labels and the default
    for case, (labels, average) in STEPS.items():
        batches = [*first[case], *second[case]]
        assert sorted(map(tuple, chain(*batches))) == sorted(PAIRS)
        trained = TwoViews(tiny_model)
        trained.load_state_dict(torch.load(tmp_path / case))
        expected = step_of_a_loop(tiny_model, batches, RATE * (2 if labels and average else 1))
        assert_same_weights(trained, expected)

    # keys gathered by hand: the gradient of the mean over all rows
    rows, weight = rows_of_both()
    z1, z2 = (rows @ weight).flatten(1, 2)
    (expected,) = torch.autograd.grad(fused_infonce(z1, z2, temperature=0.05), weight)
    for found in (first, second):
        torch.testing.assert_close(torch.tensor(found["gathered"]), expected, rtol=1e-4, atol=1e-6)
