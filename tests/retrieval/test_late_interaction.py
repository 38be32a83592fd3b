"""Reranking by late interaction: scores by hand and by the library's own operator, and how a model is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sentence_transformers import MultiVectorEncoder

from tests.retrieval.support import FakeEngine, write_tiny_bert
from verl.errors import ConfigError
from verl.retrieval.corpus import Corpus
from verl.retrieval.late_interaction import LateInteractionReranker, maxsim
from verl.retrieval.rerank import RerankEngine
from verl.types import SearchResult


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    MultiVectorEncoder(str(write_tiny_bert(folder / "bert")), device="cpu").save(str(folder / "colbert"))
    return folder / "colbert"


def test_each_query_token_counts_its_best_match() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    document = torch.tensor([[0.5, 0.5], [-1.0, 1.0], [0.25, 0.0]])
    assert maxsim(query, document) == 0.5 + 2.0


def test_documents_come_in_the_order_of_the_librarys_scores(model: Path, corpus: Corpus) -> None:
    engine = RerankEngine(FakeEngine(corpus), LateInteractionReranker(str(model), "cpu"), depth=5)
    (result,) = engine.search(["river of france"], 5)
    assert isinstance(result, SearchResult)
    network = MultiVectorEncoder(str(model), device="cpu")
    read = network.encode_document([f"{document.title}\n{document.text}" for document in result.documents])
    expected = network.similarity(network.encode_query(["river of france"]), read)[0].tolist()
    assert result.scores == pytest.approx(expected, abs=1e-4) and expected == sorted(expected, reverse=True)
    assert LateInteractionReranker(str(model), "cpu").score([]) == []


def test_an_encoder_without_a_projection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither modules"):
        LateInteractionReranker(str(write_tiny_bert(tmp_path / "bert")), "cpu")
