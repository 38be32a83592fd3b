from __future__ import annotations

import json
import logging
import struct
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.retrieval.support import PASSAGES, open_corpus, write_tiny_bert
from verl.errors import ConfigError, DataError, RetrieverError
from verl.retrieval.build import build_index
from verl.retrieval.build_options import BuildOptions
from verl.retrieval.corpus import Corpus
from verl.retrieval.dense import DenseEngine, check_vectors, index_file, open_engine
from verl.retrieval.encoder import load_encoder
from verl.retrieval.encoder_spec import EncoderConfig
from verl.retrieval.engine import IndexInfo, open_index
from verl.retrieval.import_index import import_index
from verl.retrieval.index_kinds import KINDS, IndexConfig
from verl.retrieval.search_config import SearchConfig, Tuning
from verl.retrieval.vectors import open_embeddings

CPU = EncoderConfig(device="cpu")
WORDS = ["river", "capital", "planet", "moon", "iron", "king", "sea", "tree"]


def reference(model: Path | str, text: str) -> np.ndarray:
    """One text, no padding, no batch: the textbook way to use such a model."""
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    with torch.no_grad():
        hidden = network(**tokenizer(text, return_tensors="pt", truncation=True, max_length=127)).last_hidden_state[0]
    vector = hidden.mean(dim=0)
    return (vector / vector.norm()).numpy()


def build(corpus: Corpus, model: Path, folder: Path, kind: str = "Flat", vectors: Path | None = None) -> Path:
    index = IndexConfig(kind, **({"hnsw_m": 8, "ef_construction": 40} if kind == "HNSW" else {}))
    options = BuildOptions(model=str(model), encoder=CPU, index=index, embedding_path=vectors)
    build_index(corpus, "e5", folder, options)
    return folder


@pytest.fixture
def folder(corpus: Corpus, tiny_bert: Path, tmp_path: Path) -> Path:
    return build(corpus, tiny_bert, tmp_path / "index")


@pytest.fixture
def engine(folder: Path, corpus: Corpus) -> DenseEngine:
    return open_engine(folder, corpus, IndexInfo.load(folder), encoder=CPU)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Three hundred documents, many of which are the same."""
    rng = np.random.default_rng(0)
    passages = [(f"d{row}", " ".join(rng.choice(WORDS, 1)), " ".join(rng.choice(WORDS, 2))) for row in range(300)]
    return open_corpus(tmp_path_factory.mktemp("words"), passages)


@pytest.fixture(scope="module")
def vectors(words: Corpus, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vectors of `words`, as published embeddings are."""
    encoder = load_encoder("e5", str(tiny_bert), CPU)
    path = tmp_path_factory.mktemp("vectors") / "emb_e5.memmap"
    encoder.encode_passages([document.contents for document in words.documents()]).tofile(path)
    return path


def test_search_is_exact(engine: DenseEngine, tiny_bert: Path) -> None:
    passages = np.stack([reference(tiny_bert, f'passage: "{title}"\n{text}') for _, title, text in PASSAGES])
    query = reference(tiny_bert, "query: capital of germany")
    expected = passages @ query
    (result,) = engine.search(["capital of germany"], topk=8)
    assert {d.id: s for d, s in zip(result.documents, result.scores, strict=True)} == pytest.approx(
        {passage[0]: float(score) for passage, score in zip(PASSAGES, expected, strict=True)}, abs=1e-5
    )
    assert list(result.scores) == sorted(result.scores, reverse=True)


def test_equal_scores_come_in_the_order_of_ids_for_every_topk(engine: DenseEngine) -> None:
    (full,) = engine.search(["a twin passage"], topk=8)
    twins = [document.id for document in full.documents if document.title == "Twin"]
    assert twins == ["d5", "d6", "d7"]
    for topk in range(1, 8):
        (head,) = engine.search(["a twin passage"], topk=topk)
        assert head.documents == full.documents[:topk] and head.scores == full.scores[:topk]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_served_the_same_alone_in_a_batch_and_after_a_restart(
    words: Corpus, vectors: Path, tiny_bert: Path, tmp_path: Path, kind: str
) -> None:
    build(words, tiny_bert, tmp_path / "index", kind, vectors)
    queries = [f"{a} of the {b}" for a in WORDS for b in WORDS[:4]]
    first, second = (open_index(tmp_path / "index", words, "e5", threads=1, encoder=CPU) for _ in range(2))
    together = first.search(queries, 5)
    assert together == second.search(queries, 5) == [first.search([query], 5)[0] for query in queries]
    assert first.info == second.info
    for result in together:
        keys = [(-score, document.id) for score, document in zip(result.scores, result.documents, strict=True)]
        assert len(keys) == 5 and keys == sorted(keys)


def test_a_text_that_cannot_be_encoded_is_an_error_of_its_own(engine: DenseEngine) -> None:
    good, bad, last = engine.search(["river", "half a pair \ud800", "capital"], 2)
    assert isinstance(bad, RetrieverError) and "no valid Unicode" in str(bad)
    assert [good, last] == engine.search(["river", "capital"], 2)
    assert engine.search([], 2) == []


def test_topk_above_the_corpus_is_refused(engine: DenseEngine) -> None:
    with pytest.raises(RetrieverError, match="topk=9 exceeds the corpus's 8 documents"):
        engine.search(["x"], topk=9)


def test_a_graph_bounds_topk_by_its_candidates(words: Corpus, vectors: Path, tiny_bert: Path, tmp_path: Path) -> None:
    build(words, tiny_bert, tmp_path / "index", "HNSW", vectors)
    engine = open_index(tmp_path / "index", words, "e5", search=SearchConfig(ef_search=50), encoder=CPU)
    assert len(engine.search(["river"], 50)[0].documents) == 50
    with pytest.raises(RetrieverError, match="topk=51 exceeds e5's most, 50 documents"):
        engine.search(["river"], 51)


def test_search_parameters_are_checked_and_belong_to_the_fingerprint(
    words: Corpus, vectors: Path, tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = build(words, tiny_bert, tmp_path / "index", "IVF-SQ8", vectors)
    found = IndexInfo.load(folder)
    assert found.settings["nlist"] == 4 and list(found.files) == ["e5_IVF-SQ8.index"]

    def probe(search: SearchConfig | None) -> tuple[object, str]:
        info = open_index(folder, words, "e5", search=search, encoder=CPU).info
        return info.details["nprobe"], info.fingerprint

    with caplog.at_level(logging.WARNING):
        assert probe(None)[0] == 4
    assert "nprobe=4 is a guess" in caplog.text
    assert probe(SearchConfig(nprobe=2))[0] == 2
    mark = found.files["e5_IVF-SQ8.index"]
    Tuning(mark, "nprobe", 3, 10, 0.97, 0.95, 100, 1e3, "vectors").save(folder)
    caplog.clear()
    assert probe(None)[0] == 3 and "guess" not in caplog.text
    assert len({probe(SearchConfig(nprobe=n))[1] for n in (1, 2, 3)} | {probe(None)[1]}) == 3
    with pytest.raises(ConfigError, match="nprobe=5 exceeds the index's 4 clusters"):
        probe(SearchConfig(nprobe=5))
    with pytest.raises(ConfigError, match="ef_search=9 was given for an index of kind IVF-SQ8, which has none"):
        probe(SearchConfig(ef_search=9))
    with pytest.raises(ConfigError, match="nprobe=0; expected at least 1"):
        SearchConfig(nprobe=0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "cannot be read"), ('{"value": 3}', "cannot be read"), (None, "belongs to another index")],
)
def test_a_tuning_of_something_else_is_refused(
    words: Corpus, vectors: Path, tiny_bert: Path, tmp_path: Path, text: str | None, reason: str
) -> None:
    folder = build(words, tiny_bert, tmp_path / "index", "IVF-Flat", vectors)
    if text is None:
        Tuning("1:abc", "nprobe", 3, 10, 0.97, 0.95, 100, 1e3, "vectors").save(folder)
    else:
        (folder / "tune.json").write_text(text)
    with pytest.raises(DataError, match=rf"tune.json {reason}.*delete it, or run .* tune"):
        open_index(folder, words, "e5", encoder=CPU)


def test_another_encoder_is_refused(folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    retrained = write_tiny_bert(tmp_path / "retrained", seed=1)
    wider = write_tiny_bert(tmp_path / "wider", width=64)
    with pytest.raises(ConfigError, match=r"another encoder.*cosine.*--retriever_model"):
        open_index(folder, corpus, "e5", str(retrained))
    with pytest.raises(ConfigError, match="vectors of 32 numbers, the encoder makes 64"):
        open_index(folder, corpus, "e5", str(wider))


def test_the_encoder_is_used_as_the_index_was_built(corpus: Corpus, tiny_bert: Path, tmp_path: Path) -> None:
    options = BuildOptions(model=str(tiny_bert), encoder=CPU, encoder_overrides={"pooling": "cls", "query_prefix": ""})
    build_index(corpus, "e5", tmp_path / "cls", options)
    opened = open_index(tmp_path / "cls", corpus, "e5", encoder=CPU)
    assert (opened.info.details["encoder_pooling"], opened.info.details["encoder_query_prefix"]) == ("cls", "")
    other = open_index(tmp_path / "cls", corpus, "e5", encoder=CPU, encoder_overrides={"query_prefix": "query: "})
    assert other.info.fingerprint != opened.info.fingerprint
    assert other.search(["river"], 1) != opened.search(["river"], 1)
    with pytest.raises((ConfigError, DataError), match="another encoder"):
        open_index(tmp_path / "cls", corpus, "e5", encoder=CPU, encoder_overrides={"pooling": "mean"})


@pytest.mark.parametrize("kind", ["Flat", "IVF-PQ"])
def test_documents_in_another_order_are_refused(
    words: Corpus, vectors: Path, tiny_bert: Path, tmp_path: Path, kind: str
) -> None:
    """The corpus that is checked against has some rows in common with the one that was indexed, and not the others."""
    path = build(words, tiny_bert, tmp_path / "index", kind, vectors) / index_file("e5", kind)
    passages = [(document.id, document.title, document.text) for document in words.documents()]
    shifted = open_corpus(tmp_path, [*passages[:150], *passages[160:], *passages[150:160]])
    bare = tmp_path / "bare"
    bare.mkdir()
    path.rename(bare / path.name)
    with pytest.raises(DataError, match=r"another order, .* the vectors of rows \[\d+.*are not those of their"):
        open_index(bare, shifted, "e5", str(tiny_bert), encoder=CPU)


def test_a_damaged_index_is_refused(folder: Path, corpus: Corpus) -> None:
    path = folder / index_file("e5", "Flat")
    whole = path.read_bytes()
    for size in (0, 10, 100, len(whole) - 8):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="damaged"):
            open_index(folder, corpus, "e5")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"it is not the file that index.json was written for"):
        open_index(folder, corpus, "e5")
    path.unlink()
    with pytest.raises(DataError, match=r"e5_Flat.index is damaged: the file is missing"):
        open_index(folder, corpus, "e5")


def test_a_file_of_another_size_or_kind_is_refused(folder: Path, corpus: Corpus) -> None:
    path = folder / index_file("e5", "Flat")
    info = replace(IndexInfo.load(folder), files={})
    for index, message in (
        (faiss.IndexFlatIP(32), "3 vectors for 8 documents"),
        (faiss.index_factory(32, "SQfp16", faiss.METRIC_INNER_PRODUCT), "it is SQfp16, index.json says Flat"),
    ):
        index.train(np.zeros((3, 32), np.float32))
        index.add(np.zeros((3, 32), np.float32))
        faiss.write_index(index, str(path))
        with pytest.raises(DataError, match=message):
            open_engine(folder, corpus, info)


@pytest.fixture
def published(folder: Path, tmp_path: Path) -> Path:
    """A flat index as it is downloaded: one file, by its published name."""
    path = tmp_path / "download" / "e5_Flat.index"
    path.parent.mkdir()
    path.write_bytes((folder / "e5_Flat.index").read_bytes())
    return path


def test_a_published_index_is_served_as_it_is_and_can_be_imported(
    published: Path, folder: Path, corpus: Corpus, tiny_bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built = open_index(folder, corpus, "e5", encoder=CPU)
    for path in (published, published.parent):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            bare = open_index(path, corpus, "e5", str(tiny_bert), encoder=CPU)
        assert "has no index.json, so only a few of its vectors can be checked" in caplog.text
        assert bare.search(["river", "x"], 8) == built.search(["river", "x"], 8)
    info = import_index(published, corpus, "e5", str(tiny_bert), CPU)
    assert IndexInfo.load(published.parent) == info and info.same_as(IndexInfo.load(folder))
    caplog.clear()
    imported = open_index(published, corpus, "e5", encoder=CPU)
    assert not caplog.text and imported.info.fingerprint == built.info.fingerprint == bare.info.fingerprint
    with pytest.raises(ConfigError, match=r"has an index.json already; delete it"):
        import_index(published, corpus, "e5", str(tiny_bert), CPU)


def test_the_layout_of_the_published_file_is_read(tmp_path: Path, corpus: Corpus, tiny_bert: Path) -> None:
    """Written by hand, number by number, as FAISS has laid out a flat inner-product index since version 1.5."""
    encoder = load_encoder("e5", str(tiny_bert), CPU)
    vectors = encoder.encode_passages([document.contents for document in corpus.documents()])
    head = b"IxFI" + struct.pack("<iqqqBi", 32, 8, 1 << 20, 1 << 20, 1, 0) + struct.pack("<Q", 8 * 32)
    (tmp_path / "e5_Flat.index").write_bytes(head + vectors.astype("<f4").tobytes())
    engine = open_index(tmp_path / "e5_Flat.index", corpus, "e5", str(tiny_bert), encoder=CPU)
    assert engine.search(["a twin passage"], 8)[0].documents[0].title


def test_a_published_index_of_something_else_is_refused(
    published: Path, corpus: Corpus, tiny_bert: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = open_corpus(tmp_path / "other", PASSAGES[:7])
    with pytest.raises(DataError, match="that of another corpus: it holds 8 vectors for 7 documents"):
        open_index(published, other, "e5", str(tiny_bert))
    with pytest.raises(ConfigError, match="another encoder"):
        open_index(published, corpus, "bge", str(tiny_bert))
    (published.parent / "more.index").touch()
    with pytest.raises(DataError, match=r"expected one .index file in its place, found e5_Flat.index, more.index"):
        open_index(published.parent, corpus, "e5", str(tiny_bert))
    with pytest.raises(ConfigError, match="retriever_name=bm25 is none"):
        import_index(published, corpus, "bm25")


def test_a_file_that_index_json_does_not_describe_is_refused(folder: Path, corpus: Corpus) -> None:
    (folder / "other.index").touch()
    with pytest.raises(DataError, match=r"index.json beside index .*other.index describes e5_Flat.index"):
        open_index(folder / "other.index", corpus, "e5")


def test_an_index_json_of_an_earlier_version_is_read(folder: Path, corpus: Corpus) -> None:
    path = folder / "index.json"
    content = json.loads(path.read_text())
    del content["files"]
    content["settings"] = {"kind": "Flat", "max_length": 256}
    path.write_text(json.dumps(content))
    assert len(open_index(folder, corpus, "e5", encoder=CPU).search(["river"], 3)[0].documents) == 3


@pytest.mark.parametrize("kind", ["SQ8", "SQfp16", "HNSW"])
def test_kinds_that_gpus_cannot_search_are_refused(
    words: Corpus, vectors: Path, tiny_bert: Path, tmp_path: Path, kind: str
) -> None:
    build(words, tiny_bert, tmp_path / "index", kind, vectors)
    with pytest.raises(ConfigError, match=f"faiss_gpu was asked for an index of kind {kind}; expected one of Flat"):
        open_index(tmp_path / "index", words, "e5", search=SearchConfig(faiss_gpu=True))


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this FAISS has GPU support")
def test_a_faiss_without_gpu_support_is_named(folder: Path, corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"the installed FAISS .* has no GPU support; install faiss-gpu"):
        open_index(folder, corpus, "e5", search=SearchConfig(faiss_gpu=True))


def test_minilm_finds_the_passage(tmp_path: Path) -> None:
    corpus = open_corpus(tmp_path)
    build_index(corpus, "minilm", tmp_path / "index", BuildOptions(encoder=CPU))
    engine = open_index(tmp_path / "index", corpus, "minilm", encoder=CPU)
    results = engine.search(["which metal melts easily", "Germany's seat"], 1)
    assert [result.documents[0].id for result in results] == ["d4", "d1"]


def test_codes_must_be_nearest_to_their_own_document(
    words: Corpus, vectors: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    """The vectors of this model are all alike: a cosine alone would let any order pass."""
    encoder = load_encoder("e5", str(tiny_bert), CPU)
    true = open_embeddings(vectors, 300, 32)
    swapped = {0: 74, 74: 0}
    for kind in ("Flat", "IVF-PQ"):
        check_vectors(lambda row, _: true[row], kind, encoder, words, tmp_path)
        with pytest.raises(DataError, match=r"rows \[0, 74\]"):
            check_vectors(lambda row, _: true[swapped.get(row, row)], kind, encoder, words, tmp_path)
