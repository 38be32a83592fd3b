"""The rollout engine for machines without vLLM: a transformers model and a decode loop of our own.

Concurrent calls decode as one batch. A request joins it as soon as there is room, and answers its caller and leaves
the batch the moment it ends.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from verl.agent.protocols import Generation, Sampling
from verl.errors import EngineError
from verl.workers.decoding import DecodingBatch
from verl.workers.engines import EngineConfig, UpdateGate, checked_weights, token_budget, torch_dtype
from verl.workers.sampler import RowSampling, sample

logger = logging.getLogger(__name__)


@dataclass
class _Row:
    """One request while it decodes."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    seed: int
    budget: int
    answer: asyncio.Future[Generation]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Group:
    """Rows that decode together; `sampling` and `batch` are aligned with `rows`."""

    rows: list[_Row]
    sampling: RowSampling
    batch: DecodingBatch

    @classmethod
    def of(cls, model: PreTrainedModel, rows: list[_Row]) -> _Group:
        sampling = RowSampling.of([row.sampling for row in rows], [row.seed for row in rows], model.device)
        return cls(rows, sampling, DecodingBatch(model, [row.prompt_ids for row in rows]))

    def kept(self, index: list[int]) -> _Group:
        self.batch.keep(index)
        return _Group([self.rows[i] for i in index], self.sampling.select(index), self.batch)

    def joined(self, other: _Group) -> _Group:
        self.batch.join(other.batch)
        return _Group(self.rows + other.rows, self.sampling.join(other.sampling), self.batch)


_Finish = Literal["stop", "length"]


class HFEngine:
    """A `RolloutEngine` over transformers."""

    def __init__(self, config: EngineConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        self.weight_version = 0
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._ends = _end_ids(model, tokenizer)
        self._seeds = random.Random(config.seed)
        self._gate = UpdateGate()
        self._waiting: deque[_Row] = deque()  # appended to by callers, taken from by the decoding thread
        self._active: list[_Row] = []
        self._decoder: asyncio.Task[None] | None = None
        self._closed = False

    @classmethod
    def load(cls, config: EngineConfig) -> HFEngine:
        """Load the model and tokenizer that `config` names.

        Raises:
            EngineError: they cannot be loaded.
        """
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch_dtype(config))
            tokenizer = AutoTokenizer.from_pretrained(config.model)
        except (OSError, ValueError) as error:
            raise EngineError(f"model {config.model!r} cannot be loaded: {error}") from error
        return cls(config, model.to(device), tokenizer)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Continue `prompt_ids`; see `PolicyEngine`."""
        if self._closed:
            raise EngineError("the hf engine is closed; create another one")
        budget = token_budget(prompt_ids, sampling, self.config.max_model_len)
        self._check_vocabulary(prompt_ids)
        seed = self._seeds.getrandbits(63) if sampling.seed is None else sampling.seed
        async with self._gate.generation():
            answer: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
            self._waiting.append(_Row(tuple(prompt_ids), sampling, seed, budget, answer))
            if self._decoder is None or self._decoder.done():
                self._decoder = asyncio.create_task(self._drain())
            return await answer

    async def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights between generations; see `RolloutEngine`."""
        async with self._gate.update():
            checked = checked_weights(self._model, weights)
            with torch.no_grad():
                for name, parameter in self._model.named_parameters():
                    parameter.copy_(checked[name])
            self.weight_version = version

    async def close(self) -> None:
        """Wait for the requests in flight and take no more."""
        self._closed = True
        if self._decoder is not None:
            await self._decoder

    def _check_vocabulary(self, prompt_ids: Sequence[int]) -> None:
        size = self._model.config.get_text_config().vocab_size
        if min(prompt_ids) < 0 or max(prompt_ids) >= size:
            raise EngineError(f"a prompt id lies outside the model's vocabulary of {size}; is the tokenizer its own?")

    async def _drain(self) -> None:
        """Decode until nothing waits; no caller is left without an answer, whatever happens."""
        call = asyncio.get_running_loop().call_soon_threadsafe
        try:
            while self._waiting:
                await asyncio.sleep(0)  # callers that are ready now start together
                try:
                    await asyncio.to_thread(self._decode, call)
                except RuntimeError as error:  # torch's own errors, out of memory among them
                    logger.error("decoding %d sequences failed: %s", len(self._active), error)
                    self._fail_active(f"decoding failed: {error}")
        finally:
            self._active.extend(self._waiting)
            self._waiting.clear()
            self._fail_active("the decoder ended without an answer")

    def _fail_active(self, cause: str) -> None:
        for row in self._active:
            if not row.answer.done():
                row.answer.set_exception(EngineError(cause))
        self._active = []

    @torch.inference_mode()
    def _decode(self, call: Callable[..., Any]) -> None:
        """Decode what waits, and what comes while it does; runs in a thread of its own and answers through `call`."""
        group: _Group | None = None
        while True:
            if fresh := self._admit():
                entering = self._step(_Group.of(self._model, fresh), call)
                group = group.joined(entering) if group and entering else group or entering
            if group is not None:
                group = self._step(group, call)
            self._active = [] if group is None else list(group.rows)
            if group is None and not self._waiting:
                return

    def _admit(self) -> list[_Row]:
        """Move waiting rows, as many as there is room for, to the active ones and return them."""
        fresh = []
        while self._waiting and len(self._active) < self.config.max_num_seqs:
            row = self._waiting.popleft()
            if not row.answer.cancelled():
                self._active.append(row)
                fresh.append(row)
        return fresh

    def _step(self, group: _Group, call: Callable[..., Any]) -> _Group | None:
        """Sample one token for every row; return the group of those that go on, None when none does."""
        drawn, logprobs = sample(group.batch.forward(), group.sampling)
        alive = self._advance(group.rows, drawn.tolist(), logprobs.tolist(), call)
        if not alive:
            return None
        group.batch.append(drawn)
        return group if len(alive) == len(group.rows) else group.kept(alive)

    def _advance(
        self, rows: Sequence[_Row], ids: Sequence[int], logprobs: Sequence[float], call: Callable[..., Any]
    ) -> list[int]:
        """Append one token to every row, answer those that end, and return the indices of the others."""
        alive = []
        for index, (row, token, logprob) in enumerate(zip(rows, ids, logprobs, strict=True)):
            row.ids.append(token)
            row.logprobs.append(logprob)
            finish = self._finish(row)
            if finish is not None:
                call(_answer, row, self._generation(row, finish))
            elif not row.answer.cancelled():
                alive.append(index)
        return alive

    def _finish(self, row: _Row) -> _Finish | None:
        if row.ids[-1] in self._ends or self._completes_stop(row):
            return "stop"
        return "length" if len(row.ids) >= row.budget else None

    def _completes_stop(self, row: _Row) -> bool:
        """Whether the last token completed a stop string; earlier ones did not, so a short tail tells."""
        if not row.sampling.stop:
            return False
        # A token that matters adds a character at least, except the first bytes of a split one.
        tail = row.ids[-(max(map(len, row.sampling.stop)) + 4) :]
        text = self._text(tail)
        return any(stop in text for stop in row.sampling.stop)

    def _generation(self, row: _Row, finish: _Finish) -> Generation:
        return Generation(tuple(row.ids), tuple(row.logprobs), self._text(row.ids), finish, self.weight_version)

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the end-of-sequence ids of the tokenizer and of the model's generation config."""
    stated = model.generation_config.eos_token_id if model.generation_config else None
    listed = stated if isinstance(stated, list) else [stated]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)


def _answer(row: _Row, generation: Generation) -> None:
    if not row.answer.done():
        row.answer.set_result(generation)
