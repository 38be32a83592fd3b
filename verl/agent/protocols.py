"""What the agent loop needs from the outside: a policy engine and a search function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from verl.types import Question, SearchResult


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters of one generation. `temperature=0` is greedy and really is.

    Attributes:
        stop: strings that end a generation; the token that completes one is kept, everything after it is not.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 500
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What the engine sampled.

    Attributes:
        ids: sampled token ids, the end-of-sequence token included where it was sampled.
        logprobs: log-probability of each id under the distribution it was drawn from: after temperature, top-k and
            top-p, renormalised; at temperature 0 the model's own log-softmax.
        text: decoding of `ids` without special tokens.
        finish: `"stop"` (stop string or end of sequence) or `"length"`.
        weight_version: version of the weights that sampled.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: str
    weight_version: int


class PolicyEngine(Protocol):
    """A model that continues token ids. Calls may be concurrent; the engine batches them."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Continue `prompt_ids`.

        Raises:
            EngineError: the prompt does not fit the model's context, or the engine died.
        """
        ...


class Search(Protocol):
    """Retrieval as a callable; concurrent calls are merged into batches behind it."""

    async def __call__(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        """Return one result per query, in order.

        Raises:
            RetrieverError: after bounded retries; never an empty or made-up result instead.
        """
        ...


@runtime_checkable
class PerQuestion(Protocol):
    """A search that treats every question apart, for example with a date up to which publications count."""

    def bound(self, question: Question) -> Search:
        """Return the search for the queries of one question."""
        ...


def bound_to(search: Search, question: Question) -> Search:
    """Return `search` as it is for one question; most are the same for all."""
    return search.bound(question) if isinstance(search, PerQuestion) else search
