"""Dense search on GPUs: the same documents and scores as on the CPU, on one device and split over all."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from verl.retrieval.dense import open_source
from verl.retrieval.dense_gpu import gpu_source
from verl.retrieval.dense_search import Hits, nearest
from verl.retrieval.index_file import read_index_file, write_index_file
from verl.retrieval.index_kinds import IndexConfig, lay_out

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hasattr(faiss, "StandardGpuResources"), reason="needs faiss-gpu"),
]

ROWS, WIDTH = 20_000, 64


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    made = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    made[100:150] = made[7]
    return made


def head(hits: Hits) -> list[tuple[float, int]]:
    return sorted(zip((-hits.scores).tolist(), hits.rows.tolist(), strict=True))[:10]


def test_flat_gives_what_the_cpu_gives(vectors: np.ndarray, tmp_path: Path) -> None:
    write_index_file(lay_out(IndexConfig("Flat"), ROWS, WIDTH), vectors, tmp_path / "x")
    index = read_index_file(tmp_path / "x")
    queries = vectors[:50] + np.float32(0.01)
    on_cpu = [head(hits) for hits in nearest(open_source(index, {}), queries, 10)]
    source = gpu_source(index, "Flat")
    assert [head(hits) for hits in nearest(source, queries, 10)] == on_cpu
    assert [head(nearest(source, query[np.newaxis], 10)[0]) for query in queries] == on_cpu


@pytest.mark.parametrize("kind", ["IVF-Flat", "IVF-SQ8", "IVF-PQ"])
def test_clusters_give_nearly_what_the_cpu_gives(vectors: np.ndarray, tmp_path: Path, kind: str) -> None:
    """Half-precision centroids may choose another cluster now and then; scores are the same either way."""
    write_index_file(lay_out(IndexConfig(kind, nlist=64), ROWS, WIDTH), vectors, tmp_path / "x")
    index = read_index_file(tmp_path / "x")
    queries = vectors[:50] + np.float32(0.01)
    on_cpu = [set(head(hits)) for hits in nearest(open_source(index, {"nprobe": 16}), queries, 10)]
    on_gpu = [set(head(hits)) for hits in nearest(gpu_source(index, kind), queries, 10)]
    shared = np.mean([len(one & other) / 10 for one, other in zip(on_cpu, on_gpu, strict=True)])
    assert shared > 0.95
