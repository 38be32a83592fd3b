from __future__ import annotations

import resource
import struct
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from verl.errors import DataError
from verl.retrieval.dense import open_source
from verl.retrieval.dense_search import nearest
from verl.retrieval.file_mark import file_mark
from verl.retrieval.index_file import kind_of, read_index_file, reason, trained_index, write_index_file
from verl.retrieval.index_kinds import KINDS, IndexConfig, lay_out

ROWS, WIDTH = 600, 16
CONFIG = {"ef_construction": 20, "hnsw_m": 8}


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    made = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def files(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small index of each kind."""
    folder = tmp_path_factory.mktemp("indexes")
    for kind in KINDS:
        write_index_file(lay_out(IndexConfig(kind, **CONFIG), ROWS, WIDTH), vectors, folder / kind)
    return {kind: folder / kind for kind in KINDS}


@pytest.mark.parametrize("kind", ["Flat", "SQ8", "SQfp16"])
def test_a_file_written_code_by_code_is_the_one_that_faiss_writes(
    files: dict[str, Path], vectors: np.ndarray, kind: str
) -> None:
    index = trained_index(lay_out(IndexConfig(kind), ROWS, WIDTH), vectors)
    index.add(vectors)
    assert files[kind].read_bytes() == faiss.serialize_index(index).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_mapped_known_and_holds_the_vectors(
    files: dict[str, Path], vectors: np.ndarray, kind: str
) -> None:
    index = read_index_file(files[kind])
    assert (kind_of(index, files[kind]), index.ntotal, index.d) == (kind, ROWS, WIDTH)
    assert str(files[kind]) in Path("/proc/self/maps").read_text(), "the file must be mapped, not read"
    if isinstance(index, faiss.IndexIVF):
        index.make_direct_map()
    held = index.reconstruct_n(0, ROWS)
    cosines = (held * vectors).sum(axis=1) / np.linalg.norm(held, axis=1)
    assert cosines.min() > (0.5 if kind == "IVF-PQ" else 0.999)


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimated_size_is_that_of_the_file(files: dict[str, Path], kind: str) -> None:
    estimate = lay_out(IndexConfig(kind, **CONFIG), ROWS, WIDTH).index_bytes
    assert estimate == pytest.approx(files[kind].stat().st_size, rel=0.06, abs=1000)


def test_the_same_seed_makes_the_same_file(vectors: np.ndarray, files: dict[str, Path], tmp_path: Path) -> None:
    for seed in (0, 1):
        config = IndexConfig("IVF-SQ8", seed=seed, train_size=500)
        write_index_file(lay_out(config, ROWS, WIDTH), vectors, tmp_path / f"{seed}")
        write_index_file(lay_out(config, ROWS, WIDTH), vectors, tmp_path / "again")
        assert (tmp_path / f"{seed}").read_bytes() == (tmp_path / "again").read_bytes()
    assert (tmp_path / "0").read_bytes() != (tmp_path / "1").read_bytes()


def test_half_precision_vectors_are_taken(vectors: np.ndarray, tmp_path: Path) -> None:
    write_index_file(lay_out(IndexConfig("Flat"), ROWS, WIDTH), vectors.astype(np.float16), tmp_path / "half")
    held = read_index_file(tmp_path / "half").reconstruct_n(0, ROWS)
    assert np.array_equal(held, vectors.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_was_cut_short_is_refused(files: dict[str, Path], tmp_path: Path, kind: str) -> None:
    whole = files[kind].read_bytes()
    path = tmp_path / "cut.index"
    for size in [0, 3, 36, 60, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"^index \S*/cut.index is damaged[: ][^\n]+$"):
            read_index_file(path)


@pytest.mark.parametrize("rows", [ROWS + 1, 2**40, -1])
def test_a_header_that_says_too_much_is_refused(files: dict[str, Path], tmp_path: Path, rows: int) -> None:
    whole = bytearray(files["Flat"].read_bytes())
    whole[8:16] = struct.pack("<q", rows)
    path = tmp_path / "lies.index"
    path.write_bytes(whole)
    with pytest.raises(DataError, match=rf"its header says {rows} vectors of 16 numbers, which take .* every part"):
        read_index_file(path)


def test_no_damage_to_a_bare_file_ends_the_process(files: dict[str, Path], tmp_path: Path) -> None:
    """In a process of its own, because a fault in native code would end this one."""
    code = "import sys; from tests.retrieval.test_index_file import survive; survive(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(files["Flat"].parent), str(tmp_path / "damaged.index")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, searched = map(int, done.stdout.split())
    assert refused > 20 and searched > 20 and refused + searched == 40 * len(KINDS)


def survive(folder: str, path: str) -> None:
    """Overwrite a few bytes of each kind of index at random, mostly near its head, and search what can be opened."""
    rng = np.random.default_rng(0)
    refused = 0
    for kind in KINDS:
        whole = (Path(folder) / kind).read_bytes()
        for number in range(40):
            damaged = bytearray(whole)
            at = int(rng.integers(4, len(whole) - 8 if number % 4 == 0 else 400))
            damaged[at : at + 8] = rng.bytes(8)
            Path(path).write_bytes(damaged)
            try:
                index = read_index_file(Path(path))
                kind_of(index, Path(path))
            except DataError:
                refused += 1
                continue
            if (index.d, index.ntotal) == (WIDTH, ROWS):
                search(index)
    sys.stdout.write(f"{refused} {40 * len(KINDS) - refused}")


def search(index: faiss.Index) -> None:
    parameters = {"nprobe": min(4, index.nlist)} if isinstance(index, faiss.IndexIVF) else {}
    source = open_source(index, {"ef_search": 32} if isinstance(index, faiss.IndexHNSW) else parameters)
    for hits in nearest(source, np.eye(2, WIDTH, dtype=np.float32), 5):
        assert set(hits.rows.tolist()) <= set(range(ROWS))
    source.close()


def test_what_is_no_inner_product_index_of_a_known_kind_is_refused(vectors: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "other.index"
    faiss.write_index(faiss.index_factory(WIDTH, "Flat"), str(path))
    with pytest.raises(DataError, match=r"has FAISS metric 1, expected 0 \(inner product\)"):
        read_index_file(path)
    for factory in ("SQ4", "PCA8,Flat"):
        index = faiss.index_factory(WIDTH, factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        faiss.write_index(index, str(path))
        with pytest.raises(DataError, match="of a sort that is not served"):
            kind_of(read_index_file(path), path)
    with pytest.raises(DataError, match="the file is missing"):
        read_index_file(tmp_path / "nowhere")
    path.write_bytes(b"no index at all, but long enough for a header")
    with pytest.raises(DataError, match=r"damaged \(Index type .* not recognized"):
        read_index_file(path)


def test_an_index_that_cannot_be_written_raises_oserror(vectors: np.ndarray, tmp_path: Path) -> None:
    for kind in ("Flat", "IVF-Flat"):
        with pytest.raises(OSError, match="nowhere"):
            write_index_file(lay_out(IndexConfig(kind), ROWS, WIDTH), vectors, tmp_path / "nowhere" / "x")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", [1, 5000])
def test_a_disk_that_is_full_at_any_point_raises_oserror(
    vectors: np.ndarray, files: dict[str, Path], tmp_path: Path, kind: str, missing: int
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (files[kind].stat().st_size - missing, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large|the disk may be full"):
            write_index_file(lay_out(IndexConfig(kind, **CONFIG), ROWS, WIDTH), vectors, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_faiss_error_is_told_without_its_c_signature() -> None:
    text = "Error in void f(int) at /project/x.cpp:7: Error: 'a == b' failed: too\n short"
    assert reason(RuntimeError(text)) == "'a == b' failed: too short"
    assert reason(RuntimeError("plain")) == "plain"


def test_the_mark_of_a_file_changes_with_its_content(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(bytes(10_000))
    mark = file_mark(path)
    assert mark.startswith("10000:") and file_mark(path) == mark
    path.write_bytes(bytes(9_999) + b"x")
    assert file_mark(path) != mark


def test_the_mark_of_a_large_file_covers_its_ends_and_samples(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate((64 << 20) + 4096)
    marks = {file_mark(path)}
    for at in (0, 1 << 20, (1 << 20) + 128 * ((62 << 20) + 4096) // 256, (64 << 20) + 4095):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"x")
        marks.add(file_mark(path))
    assert len(marks) == 5
