from __future__ import annotations

from pathlib import Path

import pytest

from tests.retrieval.support import open_corpus, write_tiny_bert
from verl.retrieval.corpus import Corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return open_corpus(tmp_path)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("models") / "bert")
