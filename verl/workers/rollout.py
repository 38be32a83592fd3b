"""The rollout worker: a policy engine, the agent loop and the reward, together in one process.

A trajectory is scored the moment it ends, while others still search. The worker gets its grammar, search and scorer
from a factory that the trainer hands in, and constructs no client itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from verl.agent import loop
from verl.agent.grammar.base import Grammar
from verl.agent.protocols import PolicyEngine, Sampling, Search, bound_to
from verl.errors import EngineError
from verl.types import Question, RewardOutcome, SearchResult, Trajectory
from verl.workers.engines import EngineConfig, RolloutEngine, create_engine

if TYPE_CHECKING:
    from verl.workers.engine_vllm import VLLMEngine

Score = Callable[[Trajectory], Awaitable[RewardOutcome]]


@dataclass(frozen=True)
class Surroundings:
    """What a rollout worker plays in; `close` releases the clients behind `search` and `score`."""

    grammar: Grammar
    search: Search
    score: Score
    tokenizer: loop.Tokenizer
    close: Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Sample:
    """One scored trajectory and where its time went, in seconds."""

    trajectory: Trajectory
    outcome: RewardOutcome
    search_seconds: float
    reward_seconds: float
    seconds: float


class RolloutWorker:
    """Plays questions with the current weights; made to live in a Ray actor, where its coroutines run concurrently."""

    def __init__(self, engine: EngineConfig, surroundings: Callable[[], Surroundings]) -> None:
        self._config = engine
        self._make_surroundings = surroundings
        self._surroundings: Surroundings | None = None
        self._engine: RolloutEngine | None = None

    async def start(self) -> None:
        """Load the engine and open the clients, inside the event loop that will use them.

        Raises:
            EngineError: the engine cannot start.
        """
        self._engine = create_engine(self._config)
        self._surroundings = self._make_surroundings()

    async def sample(self, question: Question, seeds: Sequence[int | None], sampling: Sampling) -> list[Sample]:
        """Play one question once per seed, concurrently (the samples share their prompt's cache)."""
        engine, around = self._ready
        return list(await asyncio.gather(*(play(question, engine, around, replace(sampling, seed=s)) for s in seeds)))

    async def update_weights(self, weights: dict[str, Tensor] | Iterable[tuple[str, Tensor]], version: int) -> int:
        """Replace the policy's weights between generations; returns `version`."""
        pairs = weights.items() if isinstance(weights, dict) else weights
        await self._ready[0].update_weights(pairs, version)
        return version

    async def connect_trainer(self, init_info: dict[str, Any]) -> None:
        """Join the trainer's GPU transfer group; this and the next four are vLLM's, see `VLLMEngine`."""
        await self._transferring.connect_trainer(init_info)

    async def start_weight_update(self) -> None:
        """Hold off generations and make ready to receive."""
        await self._transferring.start_weight_update()

    async def receive_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Receive what the trainer sends now."""
        await self._transferring.receive_weights(update_info)

    async def finish_weight_update(self) -> None:
        """Put the received weights into use."""
        await self._transferring.finish_weight_update()

    async def set_weight_version(self, version: int) -> None:
        """Say which version the received weights are."""
        self._transferring.set_weight_version(version)

    async def sleep(self) -> None:
        """Give the device's memory back to the trainer until `wake`."""
        await self._transferring.sleep()

    async def wake(self, what: Sequence[str]) -> None:
        """Take memory for `what`: `weights`, `kv_cache`."""
        await self._transferring.wake(what)

    async def weight_version(self) -> int:
        """Return the version of the weights that sample now."""
        return self._ready[0].weight_version

    async def close(self) -> None:
        """Stop the engine and close the clients."""
        if self._surroundings is not None:
            await self._surroundings.close()
        if self._engine is not None:
            await self._engine.close()

    @property
    def _transferring(self) -> VLLMEngine:
        from verl.workers.engine_vllm import VLLMEngine  # only a machine with vLLM gets here

        engine = self._ready[0]
        if not isinstance(engine, VLLMEngine):
            raise EngineError(f"engine.kind={self._config.kind} cannot share a GPU's weights; use vllm, or copy them")
        return engine

    @property
    def _ready(self) -> tuple[RolloutEngine, Surroundings]:
        if self._engine is None or self._surroundings is None:
            raise RuntimeError("the rollout worker has not been started; call start() first")
        return self._engine, self._surroundings


async def play(question: Question, engine: PolicyEngine, around: Surroundings, sampling: Sampling) -> Sample:
    """Play one question once and score it."""
    began = time.monotonic()
    search = _TimedSearch(bound_to(around.search, question))
    trajectory = await loop.run(question, around.grammar, engine, search, around.tokenizer, sampling)
    ended = time.monotonic()
    outcome = await around.score(trajectory)
    now = time.monotonic()
    return Sample(trajectory, outcome, search.seconds, now - ended, now - began)


class _TimedSearch:
    """A search that adds up how long its callers waited."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self.seconds = 0.0

    async def __call__(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        began = time.monotonic()
        try:
            return await self._search(queries, topk)
        finally:
            self.seconds += time.monotonic() - began
