from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.retrieval.support import PASSAGES, open_corpus, write_tiny_bert
from verl.errors import ConfigError, DataError, RetrieverError
from verl.retrieval.corpus import Corpus
from verl.retrieval.dense import DenseEngine, index_file, index_info, open_engine, write_index
from verl.retrieval.encoder import Encoder, load_encoder
from verl.retrieval.encoder_spec import ENCODERS, EncoderConfig
from verl.retrieval.engine import IndexInfo

TEXTS = ["the river", "capital of the planet is 42, or so they say", "x", "", "a longer text: " + "word " * 8]
PREFIXES = {
    "e5": ("query: ", "passage: "),
    "bge": ("Represent this sentence for searching relevant passages: ", ""),
    "minilm": ("", ""),
}


def reference(model: Path | str, text: str, pooling: str) -> np.ndarray:
    """One text, no padding, no batch: the textbook way to use such a model."""
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    with torch.no_grad():
        hidden = network(**tokenizer(text, return_tensors="pt", truncation=True, max_length=127)).last_hidden_state[0]
    vector = hidden[0] if pooling == "cls" else hidden.mean(dim=0)
    return (vector / vector.norm()).numpy()


@pytest.mark.parametrize("name", list(PREFIXES))
def test_vectors_are_those_of_the_plain_model(tiny_bert: Path, name: str) -> None:
    encoder = load_encoder(name, str(tiny_bert), EncoderConfig(device="cpu", batch_size=2))
    pooling = "cls" if name == "bge" else "mean"
    query_prefix, passage_prefix = PREFIXES[name]
    for encode, prefix in ((encoder.encode_queries, query_prefix), (encoder.encode_passages, passage_prefix)):
        vectors = encode(TEXTS)
        assert vectors.shape == (5, 32) and vectors.dtype == np.float32
        expected = np.stack([reference(tiny_bert, prefix + text, pooling) for text in TEXTS])
        np.testing.assert_allclose(vectors, expected, atol=2e-6)


def test_a_text_alone_and_in_any_batch_has_the_same_vector(tiny_bert: Path) -> None:
    encoder = load_encoder("e5", str(tiny_bert), EncoderConfig(device="cpu"))
    together = encoder.encode_queries(TEXTS)
    np.testing.assert_allclose(np.concatenate([encoder.encode_queries([t]) for t in TEXTS]), together, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_queries(TEXTS[::-1])[::-1], together, atol=1e-6)


def test_a_long_text_is_cut_counted_and_logged_once(tiny_bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = load_encoder("minilm", str(tiny_bert), EncoderConfig(device="cpu"))
    assert encoder.spec.max_length == 127, "the model has 128 positions and one is kept for padding"
    long = "a " * 125
    with caplog.at_level(logging.WARNING):
        exact = encoder.encode_passages([long])
        assert encoder.truncated == 0
        cut = encoder.encode_passages([long + "river " * 9, "a " * 500])
    assert encoder.truncated == 2
    assert [record.message for record in caplog.records] == [
        "a passage is longer than 127 tokens; read up to there and counted"
    ]
    np.testing.assert_allclose(cut[0], exact[0], atol=1e-6)


def test_no_texts_are_no_vectors(tiny_bert: Path) -> None:
    assert load_encoder("e5", str(tiny_bert), EncoderConfig(device="cpu")).encode_queries([]).shape == (0, 32)


def test_a_model_that_cannot_be_loaded_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be loaded.*pass --retriever_model"):
        load_encoder("e5", str(tmp_path), EncoderConfig(device="cpu"))
    with pytest.raises(ConfigError, match="'e6' is unknown; expected one of e5, bge, minilm"):
        load_encoder("e6")


def test_a_dense_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size=0"):
        EncoderConfig(batch_size=0)


@pytest.fixture
def built(corpus: Corpus, tiny_bert: Path, tmp_path: Path) -> tuple[Path, IndexInfo]:
    folder = tmp_path / "index"
    folder.mkdir()
    return folder, write_index(corpus, folder, "e5", str(tiny_bert), EncoderConfig(device="cpu", batch_size=3))


@pytest.fixture
def engine(built: tuple[Path, IndexInfo], corpus: Corpus) -> DenseEngine:
    return open_engine(built[0], corpus, built[1])


def test_search_is_exact(engine: DenseEngine, tiny_bert: Path) -> None:
    passages = np.stack([reference(tiny_bert, f'passage: "{title}"\n{text}', "mean") for _, title, text in PASSAGES])
    query = reference(tiny_bert, "query: capital of germany", "mean")
    expected = passages @ query
    (result,) = engine.search(["capital of germany"], topk=8)
    assert {d.id: s for d, s in zip(result.documents, result.scores, strict=True)} == pytest.approx(
        {passage[0]: float(score) for passage, score in zip(PASSAGES, expected, strict=True)}, abs=1e-5
    )
    assert list(result.scores) == sorted(result.scores, reverse=True)


def test_equal_scores_come_in_corpus_order_for_every_topk(engine: DenseEngine) -> None:
    (full,) = engine.search(["a twin passage"], topk=8)
    twins = [document.id for document in full.documents if document.title == "Twin"]
    assert twins == ["d5", "d6", "d7"]
    for topk in range(1, 8):
        (head,) = engine.search(["a twin passage"], topk=topk)
        assert head.documents == full.documents[:topk] and head.scores == full.scores[:topk]


def test_a_query_alone_and_in_a_batch_has_the_same_result(engine: DenseEngine) -> None:
    queries = [text for _, _, text in PASSAGES] + ["x", "the river", "capital?"]
    for alone, together in zip((engine.search([q], 4)[0] for q in queries), engine.search(queries, 4), strict=True):
        assert alone.documents == together.documents
        assert alone.scores == pytest.approx(together.scores, abs=1e-5)


def test_topk_above_the_corpus_is_refused(engine: DenseEngine) -> None:
    with pytest.raises(RetrieverError, match="topk=9 exceeds the corpus's 8 documents"):
        engine.search(["x"], topk=9)


def test_another_encoder_is_refused(built: tuple[Path, IndexInfo], corpus: Corpus, tmp_path: Path) -> None:
    folder, info = built
    retrained = write_tiny_bert(tmp_path / "retrained", seed=1)
    wider = write_tiny_bert(tmp_path / "wider", width=64)
    with pytest.raises(ConfigError, match=r"another encoder.*cosine.*--retriever_model"):
        open_engine(folder, corpus, info, model=str(retrained))
    with pytest.raises(ConfigError, match="vectors of 32 numbers, the encoder makes 64"):
        open_engine(folder, corpus, info, model=str(wider))


def test_a_damaged_index_is_refused(built: tuple[Path, IndexInfo], corpus: Corpus, tmp_path: Path) -> None:
    folder, info = built
    path = folder / index_file("e5")
    whole = path.read_bytes()
    for size in (0, 10, 100, len(whole) - 8):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="damaged"):
            open_engine(folder, corpus, info)
    path.unlink()
    with pytest.raises(DataError, match=r"e5_Flat.index is missing"):
        open_engine(folder, corpus, info)
    short = faiss.IndexFlatIP(32)
    short.add(np.zeros((3, 32), dtype=np.float32))
    faiss.write_index(short, str(path))
    with pytest.raises(DataError, match="3 vectors for 8 documents"):
        open_engine(folder, corpus, info)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(ConfigError, match=f"encoder device='{device}' is not there"):
        load_encoder("e5", config=EncoderConfig(device=device))


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return load_encoder("minilm", config=EncoderConfig(device="cpu"))


def test_minilm_loads_offline_and_knows_what_is_alike(minilm: Encoder) -> None:
    query = minilm.encode_queries(["How many people live in Berlin?"])[0]
    near, far = minilm.encode_passages(
        ["Berlin has a population of 3.8 million registered inhabitants.", "A cat sleeps on the sofa."]
    )
    # 0.75 or so is also what the model card of all-MiniLM-L6-v2 leads one to expect of such a pair.
    assert float(query @ near) > 0.6 > 0.2 > float(query @ far)
    assert np.linalg.norm(query) == pytest.approx(1.0, abs=1e-6)


def test_minilm_finds_the_passage(minilm: Encoder, tmp_path: Path) -> None:
    corpus = open_corpus(tmp_path)
    index = faiss.IndexFlatIP(minilm.width)
    index.add(minilm.encode_passages([document.contents for document in corpus.documents()]))
    results = DenseEngine(index_info(corpus, "minilm", None), index, minilm, corpus).search(
        ["which metal melts easily", "Germany's seat"], 1
    )
    assert [result.documents[0].id for result in results] == ["d4", "d1"]


def test_specs_are_those_of_the_model_cards() -> None:
    assert {name: dataclasses.astuple(spec)[:5] for name, spec in ENCODERS.items()} == {
        "e5": ("intfloat/e5-base-v2", "query: ", "passage: ", "mean", True),
        "bge": (
            "BAAI/bge-base-en-v1.5",
            "Represent this sentence for searching relevant passages: ",
            "",
            "cls",
            True,
        ),
        "minilm": ("sentence-transformers/all-MiniLM-L6-v2", "", "", "mean", True),
    }
