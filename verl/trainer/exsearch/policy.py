"""The policy of the moment behind one engine, for all stages of a run, and what it searches with."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from verl.agent.protocols import Search
from verl.errors import ConfigError
from verl.evaluation.identity import model_identity, retriever_identity
from verl.retrieval.client import RetrieverClient, RetrieverClientConfig
from verl.workers.engines import EngineConfig, RolloutEngine, create_engine

T = TypeVar("T")


class Player:
    """An engine and a retriever client on one event loop, opened when they are first needed; a context manager.

    The engine stays while the model does, so that the evaluation of a policy and the sampling from it start it once.
    """

    def __init__(self, engine: EngineConfig, retriever: RetrieverClientConfig) -> None:
        self._config = engine
        self._retriever_config = retriever
        self._runner = asyncio.Runner()
        self._engine: RolloutEngine | None = None
        self._model = ""
        self._client: RetrieverClient | None = None
        self._retriever = ""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's loop."""
        return self._runner.run(work)

    async def engine(self, model: str) -> RolloutEngine:
        """Return the engine of `model`.

        Raises:
            EngineError: it does not start.
        """
        identity = model_identity(model)
        if self._engine is None or identity != self._model:
            await self._close_engine()
            self._engine, self._model = create_engine(replace(self._config, model=model)), identity
        return self._engine

    @property
    def search(self) -> Search:
        """The retriever."""
        if self._client is None:
            self._client = RetrieverClient(self._retriever_config)
        return self._client

    async def retriever(self) -> str:
        """Return what identifies the index behind the retriever.

        Raises:
            RetrieverError: nothing answers.
        """
        if not self._retriever:
            self._retriever = await retriever_identity(self._retriever_config.endpoints[0])
        return self._retriever

    def release(self) -> None:
        """Free the engine's memory; it starts again when it is needed."""
        self.run(self._close_engine())

    async def _close_engine(self) -> None:
        engine, self._engine, self._model = self._engine, None, ""
        if engine is not None:
            await engine.close()

    async def _close(self) -> None:
        await self._close_engine()
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.run(self._close())
        finally:
            self._runner.close()


def tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer.

    Raises:
        ConfigError: it does not load.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as cause:
        raise ConfigError(
            f"model={model}: its tokenizer does not load ({cause}); give the folder of a complete model, for example a "
            "checkpoint's hf/, or a hub name"
        ) from cause
