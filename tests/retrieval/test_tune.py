from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.retrieval.support import open_corpus, write_jsonl
from verl.errors import ConfigError, DataError
from verl.retrieval.build import build_index, main
from verl.retrieval.build_options import BuildOptions
from verl.retrieval.corpus import Corpus
from verl.retrieval.encoder_spec import EncoderConfig
from verl.retrieval.engine import open_index
from verl.retrieval.index_file import read_index_file, write_index_file
from verl.retrieval.index_kinds import IndexConfig, lay_out
from verl.retrieval.search_config import Tuning
from verl.retrieval.tune import Measurement, Sweep, TuneConfig, exact_results, sample_queries, sweep, table

ROWS, WIDTH = 4000, 32
CPU = EncoderConfig(device="cpu")


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    made = rng.standard_normal((ROWS, WIDTH)) * np.arange(1, WIDTH + 1) ** -0.5
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def queries(vectors: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(1)
    return vectors[:100] + 0.05 * rng.standard_normal((100, WIDTH)).astype(np.float32)


def written(vectors: np.ndarray, path: Path, **config: object) -> Path:
    write_index_file(lay_out(IndexConfig(**config), len(vectors), vectors.shape[1]), vectors, path)
    return path


def plain_recall(vectors: np.ndarray, queries: np.ndarray, found: np.ndarray, k: int) -> float:
    """Share of the true best `k` that stand in `found`, by sets of rows."""
    true = np.argsort(-(queries.astype(np.float64) @ vectors.T), axis=1, kind="stable")[:, :k]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(true.tolist(), found.tolist(), strict=True)]))


def test_the_smallest_nprobe_that_reaches_the_target_is_chosen(
    vectors: np.ndarray, queries: np.ndarray, tmp_path: Path
) -> None:
    index = read_index_file(written(vectors, tmp_path / "x", kind="IVF-Flat", nlist=64))
    found = sweep(index, queries, vectors, TuneConfig(0.9))
    recalls = {}
    for nprobe in range(1, 65):
        index.nprobe = nprobe
        recalls[nprobe] = plain_recall(vectors, queries, index.search(queries, 10)[1], 10)
    smallest = min(nprobe for nprobe, recall in recalls.items() if recall >= 0.9)
    assert found.chosen is not None and found.parameter == "nprobe" and 1 < smallest < 64
    assert smallest <= found.chosen.value <= smallest + max(1, smallest // 8)
    for item in found.measurements:
        assert item.recall == pytest.approx(recalls[item.value], abs=1e-9) and item.queries_per_s > 0
    assert [item.value for item in found.measurements] == sorted({item.value for item in found.measurements})


def test_all_is_found_where_all_is_searched(vectors: np.ndarray, queries: np.ndarray, tmp_path: Path) -> None:
    for kind in ("IVF-Flat", "HNSW", "Flat"):
        index = read_index_file(written(vectors, tmp_path / kind, kind=kind))
        for exact in (vectors, None):
            found = sweep(index, queries, exact, TuneConfig(1.0))
            assert found.exact == "vectors"
            assert found.chosen is not None and found.chosen.recall == 1.0


def test_lossy_codes_are_measured_against_the_vectors_or_against_themselves(
    vectors: np.ndarray, queries: np.ndarray, tmp_path: Path
) -> None:
    index = read_index_file(written(vectors, tmp_path / "x", kind="IVF-PQ", nlist=16, pq_m=4))
    honest = sweep(index, queries, vectors, TuneConfig(0.99))
    assert honest.chosen is None and honest.exact == "vectors"
    assert honest.measurements[-1].value == 16 and honest.measurements[-1].recall < 0.9
    index.nprobe = 16
    assert honest.measurements[-1].recall == pytest.approx(
        plain_recall(vectors, queries, index.search(queries, 10)[1], 10), abs=0.02
    )
    lenient = sweep(index, queries, None, TuneConfig(0.99))
    assert lenient.chosen is not None and lenient.exact == "codes"
    assert "what the codes lose is not seen" in table(lenient, 10)


def test_a_document_as_good_as_the_last_one_counts_as_found(tmp_path: Path) -> None:
    twins = np.repeat(np.eye(4, dtype=np.float32), 50, axis=0)
    index = read_index_file(written(twins, tmp_path / "x", kind="SQfp16"))
    (found,) = sweep(index, np.eye(4, dtype=np.float32), twins, TuneConfig(1.0)).measurements
    assert (found.value, found.recall) == (0, 1.0)


def test_the_truth_is_the_score_of_the_kth_document(vectors: np.ndarray, queries: np.ndarray, tmp_path: Path) -> None:
    index = read_index_file(written(vectors, tmp_path / "x", kind="IVF-SQ8", nlist=16))
    truth = exact_results(index, queries, vectors, 5)
    expected = np.sort(queries.astype(np.float64) @ vectors.T, axis=1)[:, -5]
    np.testing.assert_allclose(truth.worst, expected, atol=1e-6)


def test_the_table_marks_the_choice() -> None:
    chosen = Measurement(4, 0.961, 2000.0)
    found = Sweep("nprobe", "vectors", 500.0, (Measurement(2, 0.8, 3000.0), chosen), chosen)
    assert table(found, 10).splitlines() == [
        "    nprobe   recall@10   queries/s   x exact",
        "         2      0.8000        3000      6.00",
        "         4      0.9610        2000      4.00  <- chosen",
    ]


@pytest.mark.parametrize("settings", [{"target_recall": 0.0}, {"target_recall": 1.5}, {"k": 0}, {"sample": 0}])
def test_senseless_targets_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match="expected"):
        TuneConfig(**settings)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    rng = np.random.default_rng(0)
    words = ["river", "capital", "planet", "moon", "iron", "king", "sea", "tree"]
    passages = [(f"d{n}", "" if n % 9 == 0 else " ".join(rng.choice(words, 2)), " ".join(rng.choice(words, 20)))
                for n in range(400)]  # fmt: skip
    return open_corpus(tmp_path_factory.mktemp("corpus"), passages)


@pytest.fixture(scope="module")
def folder(corpus: Corpus, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An IVF index of 8 clusters whose vectors were kept."""
    folder = tmp_path_factory.mktemp("built") / "index"
    config = IndexConfig("IVF-Flat", nlist=8)
    options = BuildOptions(model=str(tiny_bert), encoder=CPU, index=config, save_embedding=True)
    build_index(corpus, "e5", folder, options)
    return folder


def test_queries_are_titles_and_first_words(corpus: Corpus) -> None:
    texts = sample_queries(corpus, 50, seed=3)
    assert len(texts) == 50 and texts == sample_queries(corpus, 50, seed=3) != sample_queries(corpus, 50, seed=4)
    titles = {document.title for document in corpus.documents()}
    untitled = {" ".join(doc.text.split()[:12]) for doc in corpus.documents() if not doc.title}
    assert set(texts) <= (titles - {""}) | untitled and set(texts) & untitled
    assert len(sample_queries(corpus, 10_000, seed=0)) == 400


def test_the_command_line_writes_what_the_server_then_uses(
    folder: Path, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = open_index(folder, corpus, "e5", encoder=CPU).info
    asked = write_jsonl(tmp_path / "queries.jsonl", [{"_id": str(n), "text": f"river {n}"} for n in range(20)])
    common = ["tune", "--index_path", str(folder), "--corpus_path", str(corpus.path), "--device", "cpu"]
    main([*common, "--queries", str(asked), "--target_recall", "0.5", "--k", "5", "--threads", "1"])
    printed = capsys.readouterr().out
    assert "recall@5" in printed and "<- chosen" in printed and "codes" not in printed
    tuned = Tuning.load(folder, next(iter(json.loads((folder / "index.json").read_text())["files"].values())))
    assert tuned is not None
    assert (tuned.parameter, tuned.k, tuned.queries, tuned.exact) == ("nprobe", 5, 20, "vectors")
    assert tuned.recall >= 0.5
    after = open_index(folder, corpus, "e5", encoder=CPU).info
    assert after.details["nprobe"] == tuned.value
    assert (after.fingerprint == before.fingerprint) == (tuned.value == before.details["nprobe"])
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_target_out_of_reach_is_an_error_and_writes_nothing(
    corpus: Corpus, folder: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = IndexConfig("IVF-PQ", nlist=4, pq_m=2)
    options = BuildOptions(
        model=str(tiny_bert),
        encoder=CPU,
        index=config,
        embedding_path=folder.with_name("index.vectors") / "vectors.memmap",
        target_recall=1.0,
    )
    with pytest.raises(DataError, match=r"e5_IVF-PQ.index is not tuned: recall@10 is 0\.\d+ at best \(nprobe="):
        build_index(corpus, "e5", tmp_path / "pq", options)
    assert sorted(path.name for path in (tmp_path / "pq").iterdir()) == ["e5_IVF-PQ.index", "index.json"]
    open_index(tmp_path / "pq", corpus, "e5", encoder=CPU)
    with pytest.raises(SystemExit) as ended:
        main(["tune", "--index_path", str(tmp_path), "--corpus_path", str(corpus.path)])
    assert ended.value.code == 1
    assert "holds no index.json; write it with `python -m verl.retrieval.build import`" in capsys.readouterr().err


def test_an_index_is_tuned_as_it_is_built_and_once_only(
    corpus: Corpus, folder: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    def built(recall: float | None) -> tuple[float, int] | None:
        options = BuildOptions(
            model=str(tiny_bert),
            encoder=CPU,
            index=IndexConfig("IVF-Flat", nlist=8),
            embedding_path=folder.with_name("index.vectors") / "vectors.memmap",
            target_recall=recall,
        )
        info = build_index(corpus, "e5", tmp_path / "tuned", options)
        found = Tuning.load(tmp_path / "tuned", info.files["e5_IVF-Flat.index"])
        return None if found is None else (found.target_recall, (tmp_path / "tuned" / "tune.json").stat().st_ino)

    assert built(None) is None
    first = built(0.9)
    assert first is not None and first[0] == 0.9, "an index that was there is tuned when that is asked for"
    assert built(0.9) == first and built(None) == first
    second = built(0.95)
    assert second is not None and second[0] == 0.95


def test_a_tuning_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    tuning = Tuning("1:x", "nprobe", 3, 10, 0.97, 0.95, 100, 1e3, "vectors")
    with pytest.raises(DataError, match=r"cannot write .*tune.json"):
        tuning.save(tmp_path / "nowhere")
    assert Tuning.load(tmp_path, "1:x") is None
    tuning.save(tmp_path)
    assert Tuning.load(tmp_path, "1:x") == tuning
