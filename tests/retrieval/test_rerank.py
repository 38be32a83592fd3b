from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import BertConfig, BertForSequenceClassification

from tests.retrieval.support import FakeEngine, write_tiny_bert
from verl.errors import ConfigError, RetrieverError
from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import EngineInfo
from verl.retrieval.rerank import CrossEncoderReranker, Pair, RerankEngine, rerank
from verl.types import Document, SearchResult

WORDS = ["the", "river", "capital", "planet", "is", "of", "seine", "paris", "mercury", "light", "x", "1984"]


def write_cross_encoder(folder: Path, labels: int = 1, seed: int = 0, **config: float) -> Path:
    """Save a BERT with a random head for pairs beside `write_tiny_bert`'s tokenizer."""
    write_tiny_bert(folder)
    settings = BertConfig.from_pretrained(folder)
    settings.num_labels = labels
    for name, value in config.items():
        setattr(settings, name, value)
    torch.manual_seed(seed)
    BertForSequenceClassification(settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cross_encoder(tmp_path_factory.mktemp("models") / "cross-encoder")


@pytest.fixture(scope="session")
def reranker(model: Path) -> CrossEncoderReranker:
    return CrossEncoderReranker(str(model), device="cpu")


def some_documents(count: int, seed: int = 0, longest: int = 30) -> list[Document]:
    chance = random.Random(seed)
    return [
        Document(
            f"d{at}", chance.choice(["", "the river"]), " ".join(chance.choices(WORDS, k=chance.randint(1, longest)))
        )
        for at in range(count)
    ]


def test_scores_are_sentence_transformers_own(model: Path, reranker: CrossEncoderReranker) -> None:
    pairs = [("capital of the planet", document) for document in some_documents(40)]
    texts = [(query, f"{each.title}\n{each.text}" if each.title else each.text) for query, each in pairs]
    expected = CrossEncoder(str(model), device="cpu").predict(texts)
    assert reranker.score(pairs) == pytest.approx(expected.tolist(), abs=1e-6)
    assert len({round(score, 4) for score in reranker.score(pairs)}) > 30


def test_every_query_is_compared_with_its_own_documents_alone(reranker: CrossEncoderReranker) -> None:
    queries = ["capital of paris", "light", "planet mercury"]
    documents = [some_documents(5, seed=1), [], some_documents(9, seed=2)]
    together = reranker.rerank(queries, documents, 20)
    alone = [reranker.rerank([query], [own], 20)[0] for query, own in zip(queries, documents, strict=True)]
    assert together == alone
    for query, own, result in zip(queries, documents, together, strict=True):
        assert isinstance(result, SearchResult) and result.query == query
        assert sorted(result.documents, key=str) == sorted(own, key=str)
        assert list(result.scores) == sorted(result.scores, reverse=True)
        scores = dict(zip(own, reranker.score([(query, document) for document in own]), strict=True))
        assert result.scores == tuple(scores[document] for document in result.documents)


@pytest.mark.parametrize("batch_tokens", [1, 100, 1000, 2000, 4096, 100_000])
def test_no_score_depends_on_the_batch_not_even_in_the_last_bit(model: Path, batch_tokens: int) -> None:
    reranker = CrossEncoderReranker(str(model), device="cpu", batch_tokens=batch_tokens)
    pairs: list[Pair] = [(random.Random(at).choice(WORDS), each) for at, each in enumerate(some_documents(70))]
    whole = reranker.score(pairs)
    assert [reranker.score([pair])[0] for pair in pairs] == whole
    order = random.Random(1).sample(range(70), 70)
    assert reranker.score([pairs[at] for at in order]) == [whole[at] for at in order]
    assert reranker.score(pairs[:33]) + reranker.score(pairs[33:]) == whole


def test_a_pair_that_is_too_long_is_cut_and_counted(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    reranker = CrossEncoderReranker(str(model), device="cpu", max_length=40)
    long, short = Document("l", "", "river " * 300), Document("s", "", "river")
    reranker.score([("capital", long), ("capital", short), ("capital " * 90, long)])
    assert reranker.truncated == 2
    assert [record.message for record in caplog.records if "longer than" in record.message] == [
        "a pair is longer than 40 tokens; read up to there and counted"
    ]
    beyond = Document("b", "", long.text + "paris")
    assert reranker.score([("capital", beyond)]) == reranker.score([("capital", long)])


def test_the_models_positions_bound_the_length(model: Path) -> None:
    reranker = CrossEncoderReranker(str(model), device="cpu", max_length=10_000)
    reranker.score([("capital", Document("l", "", "river " * 126))])  # 130 tokens; the model has 128 positions
    assert reranker.truncated == 1


def test_topk_cuts_and_may_exceed_the_documents(reranker: CrossEncoderReranker) -> None:
    documents = some_documents(6)
    (whole,) = reranker.rerank(["river"], [documents], 100)
    (head,) = reranker.rerank(["river"], [documents], 2)
    assert isinstance(whole, SearchResult) and isinstance(head, SearchResult)
    assert len(whole.documents) == 6 and head.documents == whole.documents[:2] and head.scores == whole.scores[:2]


def test_equal_scores_come_in_the_order_of_ids(reranker: CrossEncoderReranker) -> None:
    twins = [Document(id, "", "the same text") for id in ("z", "a", "m", "a")]
    (result,) = reranker.rerank(["river"], [twins], 4)
    assert isinstance(result, SearchResult)
    assert [document.id for document in result.documents] == ["a", "a", "m", "z"]


def test_lists_of_documents_and_queries_must_pair_up(reranker: CrossEncoderReranker) -> None:
    with pytest.raises(RetrieverError, match="1 lists of documents came for 2 queries"):
        reranker.rerank(["a", "b"], [[]], 1)
    assert reranker.rerank([], [], 1) == [] and reranker.score([]) == []


def test_threads_may_share_a_reranker(reranker: CrossEncoderReranker) -> None:
    pairs = [("river", document) for document in some_documents(20)]
    expected, found = reranker.score(pairs), {}

    def score(number: int) -> None:
        found[number] = [reranker.score(pairs) for _ in range(2)]

    threads = [threading.Thread(target=score, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(scores == [expected] * 2 for scores in found.values()) and len(found) == 4


def test_the_fingerprint_is_of_what_decides_a_score(tmp_path: Path, model: Path) -> None:
    def fingerprint(path: Path, **options: int) -> str:
        return CrossEncoderReranker(str(path), device="cpu", **options).fingerprint

    same = write_cross_encoder(tmp_path / "same")
    other = write_cross_encoder(tmp_path / "other", seed=1)
    assert fingerprint(model) == fingerprint(same) == fingerprint(model, batch_tokens=64)
    assert len({fingerprint(model), fingerprint(other), fingerprint(model, max_length=64)}) == 3


# --- models that are none ---


def test_a_model_without_a_head_for_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is BertModel with 1 labels; expected a cross-encoder"):
        CrossEncoderReranker(str(write_tiny_bert(tmp_path / "bert")), device="cpu")
    with pytest.raises(ConfigError, match="BertForSequenceClassification with 3 labels"):
        CrossEncoderReranker(str(write_cross_encoder(tmp_path / "three", labels=3)), device="cpu")


def test_a_model_that_is_missing_or_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded on cpu"):
        CrossEncoderReranker(str(tmp_path / "nowhere"), device="cpu")
    weights = write_cross_encoder(tmp_path / "damaged") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="damaged"):
        CrossEncoderReranker(str(weights.parent), device="cpu")


def test_a_device_that_is_not_there_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded on cuda:99"):
        CrossEncoderReranker(str(model), device="cuda:99")


@pytest.mark.parametrize("wrong", [{"batch_tokens": 0}, {"max_length": 15}])
def test_a_wrong_size_is_refused(model: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        CrossEncoderReranker(str(model), device="cpu", **wrong)


def test_a_score_that_is_no_number_is_an_error_of_its_query(tmp_path: Path) -> None:
    folder = write_cross_encoder(tmp_path / "nan")
    network = BertForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        network.classifier.bias.fill_(float("nan"))
    network.save_pretrained(folder)
    broken = CrossEncoderReranker(str(folder), device="cpu")
    first, second = broken.rerank(["river", "light"], [some_documents(2), []], 3)
    assert isinstance(first, RetrieverError) and "not finite" in str(first)
    assert second == SearchResult("light", (), ())


# --- the stage ---


@dataclass
class ByLength:
    """Prefers long texts; the query does not matter."""

    model: str = "by-length"
    fingerprint: str = "by-length"
    asked: list[int] = field(default_factory=list)

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        self.asked.append(len(pairs))
        return [float(len(document.text)) for _, document in pairs]


class Failing(FakeEngine):
    def search(self, queries: Sequence[str], topk: int) -> list[SearchResult | RetrieverError]:  # type: ignore[override]
        results = super().search(queries, topk)
        return [RetrieverError("no") if result.query == "bad" else result for result in results]


def test_the_stage_orders_the_best_of_its_engine(corpus: Corpus) -> None:
    engine, reranker = FakeEngine(corpus), ByLength()
    stage = RerankEngine(engine, reranker, depth=5)
    first, second = stage.search(["one", "two"], 3)
    assert engine.calls == [(["one", "two"], 5)] and reranker.asked == [10]
    lengths = {document.id: len(document.text) for document in corpus.documents(0, 5)}
    best = sorted(lengths, key=lambda id: -lengths[id])[:3]
    assert isinstance(first, SearchResult) and isinstance(second, SearchResult)
    assert [document.id for document in first.documents] == best
    assert first.scores == tuple(float(lengths[id]) for id in best)
    assert (first.query, second.query) == ("one", "two") and first.documents == second.documents


def test_a_smaller_topk_gets_the_head(corpus: Corpus) -> None:
    stage = RerankEngine(FakeEngine(corpus), ByLength(), depth=6)
    (whole,) = stage.search(["q"], 6)
    assert isinstance(whole, SearchResult)
    for topk in range(1, 7):
        (head,) = stage.search(["q"], topk)
        assert isinstance(head, SearchResult)
        assert (head.documents, head.scores) == (whole.documents[:topk], whole.scores[:topk])
    with pytest.raises(RetrieverError, match="topk=7 exceeds"):
        stage.search(["q"], 7)


def test_the_engines_error_for_a_query_stays_that_querys(corpus: Corpus) -> None:
    good, bad, other = RerankEngine(Failing(corpus), ByLength()).search(["good", "bad", "other"], 2)
    assert isinstance(good, SearchResult) and isinstance(other, SearchResult)
    assert isinstance(bad, RetrieverError) and str(bad) == "no"


def test_what_the_stage_says_about_itself(corpus: Corpus) -> None:
    def info(name: str = "fake", model: str = "m", depth: int = 5) -> EngineInfo:
        return RerankEngine(FakeEngine(corpus, name), ByLength(model, model), depth).info

    assert (info().name, info().documents, info().max_topk, info().corpus) == ("fake+rerank", 8, 5, corpus.fingerprint)
    assert info(depth=50).max_topk == 8 and info().details == {"rerank_model": "m", "rerank_depth": 5}
    variants = [info(), info(name="other"), info(model="n"), info(depth=6)]
    assert len({each.fingerprint for each in variants}) == 4
    with pytest.raises(ConfigError, match="depth=0"):
        info(depth=0)


def test_ties_between_documents_of_equal_score_are_by_id() -> None:
    documents = [Document(id, "", "same") for id in ("b", "a")]
    (result,) = rerank(ByLength(), ["q"], [documents], 2)
    assert isinstance(result, SearchResult) and [each.id for each in result.documents] == ["a", "b"]
