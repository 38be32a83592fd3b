"""The policy of the moment behind one engine, for all stages of a run, and what it searches with."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from verl.agent.protocols import Search
from verl.errors import CheckpointError, ConfigError
from verl.evaluation.identity import model_identity, retriever_identity
from verl.retrieval.client import RetrieverClient, RetrieverClientConfig
from verl.workers.engines import EngineConfig, RolloutEngine, create_engine

T = TypeVar("T")


class Player:
    """An engine and a retriever client on one event loop, opened when they are first needed; a context manager.

    The engine stays while the model does, so that the evaluation of a policy and the sampling from it start it once.

    Args:
        keep: keep the engine over all models and give it new weights, instead of starting another one; its memory is
            never freed for the training.
    """

    def __init__(self, engine: EngineConfig, retriever: RetrieverClientConfig, keep: bool = False) -> None:
        self._config = engine
        self._keep = keep
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
        if self._engine is not None and identity != self._model:
            if self._keep and Path(model).is_dir():
                await self._engine.update_weights(weights_of(Path(model)), self._engine.weight_version + 1)
                self._model = identity
            else:
                await self._close_engine()
        if self._engine is None:
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
        """Free the engine's memory, unless it is to be kept; it starts again when it is needed."""
        if not self._keep:
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


def weights_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a model's folder.

    Raises:
        CheckpointError: it holds no safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors, from which an engine could take weights")
    for path in files:
        yield from load_file(path).items()


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
