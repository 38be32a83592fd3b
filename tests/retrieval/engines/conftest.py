from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.retrieval.engines.literature_server import LiteratureServer


@pytest.fixture
def server() -> Iterator[LiteratureServer]:
    with LiteratureServer() as running:
        yield running
