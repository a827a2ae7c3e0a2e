"""Teachers' embeddings on disk: killed, damaged, renamed and shared files."""

import subprocess
import sys

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("filelock")

from pycse.embedding_cache import CacheError, EmbeddingCache  # noqa: E402

WIDTH = 5


@pytest.fixture
def cache(tmp_path):
    return lambda key="k" * 64, width=WIDTH: EmbeddingCache(tmp_path / "cache", key, width)


def rows(n, first=0):
    return np.arange(n * WIDTH, dtype="float32").reshape(n, WIDTH) + 1 + 100 * first


def test_cache_gives_back_what_was_added(cache):
    one = cache()
    assert len(one) == 0 and one.get("a") is None
    one.add(["a", "b"], rows(2))
    one.add(["é\ud800"], rows(1, 1))
    for held in (one, cache()):
        assert len(held) == 3
        assert (held.get("a") == rows(2)[0]).all() and (held.get("b") == rows(2)[1]).all()
        assert (held.get("é\ud800") == rows(1, 1)[0]).all() and held.get("c") is None


def test_a_cut_file_loses_the_batch_that_was_cut_and_no_other(cache):
    """Whole: what was embedded together is embedded together again."""
    cache().add(["a"], rows(1))
    cache().add(["b", "d"], rows(2))
    path = cache().path
    whole = path.read_bytes()
    size = cache().record.itemsize
    for kept in range(len(whole)):
        path.write_bytes(whole[:kept])
        held = cache()
        records = 1 if kept >= len(whole) - 2 * size else 0
        assert len(held) == records
        assert held.get("b") is None and held.get("d") is None
        assert (held.get("a") is None) == (records == 0)
        held.add(["c"], rows(1, 1))
        assert (held.get("c") == rows(1, 1)[0]).all() and len(cache()) == records + 1
        assert (cache().get("c") == rows(1, 1)[0]).all()


def test_a_damaged_record_is_not_used(cache):
    cache().add(["a", "b"], rows(2))
    path, size = cache().path, cache().record.itemsize
    whole = path.read_bytes()
    for at in range(len(whole) - 2 * size, len(whole) - size):
        spoiled = bytearray(whole)
        spoiled[at] ^= 16
        path.write_bytes(bytes(spoiled))
        held = cache()
        assert held.get("a") is None and (held.get("b") == rows(2)[1]).all()
        held.add(["a"], rows(1, 3))
        assert (held.get("a") == rows(1, 3)[0]).all() and (cache().get("a") == rows(1, 3)[0]).all()


def test_another_teachers_cache_is_never_read(cache):
    mine, other = cache("a" * 64), cache("b" * 64)
    mine.add(["x"], rows(1))
    assert other.path != mine.path and other.get("x") is None
    other.path.write_bytes(mine.path.read_bytes())  # somebody renames files
    with pytest.raises(CacheError, match="does not hold embeddings of this teacher"):
        cache("b" * 64)
    same_start = cache("a" * 32 + "c" * 32) if mine.path.unlink() is None else None
    same_start.add(["x"], rows(1))
    with pytest.raises(CacheError, match="does not hold"):
        cache("a" * 64)


def test_an_older_format_is_never_read(cache, monkeypatch):
    from pycse import embedding_cache as module

    cache().add(["x"], rows(1))
    monkeypatch.setattr(module, "FORMAT", "pycse teacher embeddings 0")
    with pytest.raises(CacheError, match="does not hold"):
        cache()


def test_two_runs_share_a_cache(cache):
    one, two = cache(), cache()
    one.add(["a"], rows(1))
    two.add(["b"], rows(1, 1))
    two.add(["a"], rows(1))
    one.add(["c"], rows(1, 2))
    for held in (one, cache()):
        for i, text in enumerate("abc"):
            assert (held.get(text) == rows(1, i)[0]).all()


WRITER = """
import sys, numpy as np
from pycse.embedding_cache import EmbeddingCache
folder, start = sys.argv[1], int(sys.argv[2])
cache = EmbeddingCache(folder, "k" * 64, 5)
for i in range(start, start + 200):
    cache.add([str(i), str(i % 50)], np.full((2, 5), [[i], [i % 50]], "float32"))
    assert all((cache.get(str(j)) == j).all() for j in (i, i % 50))
"""


def test_processes_that_write_at_once(cache, tmp_path):
    folder = str(cache().path.parent)
    started = [subprocess.Popen([sys.executable, "-c", WRITER, folder, str(200 * k)]) for k in range(3)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    held = cache()
    assert len(held) == 600 and all((held.get(str(i)) == i).all() for i in range(600))
    assert (held.path.stat().st_size - 512) // held.record.itemsize == 1200


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError, match="cannot write .*give another folder"):
        EmbeddingCache(tmp_path / "file", "k" * 64, WIDTH)
