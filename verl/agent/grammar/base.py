"""What a search protocol provides so that the one agent loop can play it.

A grammar renders the prompt, reads what the policy wrote, renders what the environment answers, and decides which
documents reach the frozen generator. It never sees token ids and it never raises for text that a policy wrote. How
the protocols fit: Search-R1 differs in tags and feedback; DeepRetrieval returns an action that is `finished` and holds
a query, so the loop searches once and stops; ExSearch's observations are user turns (`as_user`), and its request for
the final answer is one after an action that is neither a query nor finished; IRCoT reads a whole response as the query
and rebuilds its prompt (`rebuild`); Search-o1 awaits its condensing model inside `observe`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from verl.types import Document, Question, SearchResult, Turn


@dataclass(frozen=True, slots=True)
class Limits:
    """What one trajectory may spend.

    Attributes:
        topk: documents asked of the retriever per query.
        searches: generations that may search; one more follows in which a query is ignored.
        generation_tokens: tokens the policy may sample in one turn, over all its segments.
        observation_tokens: longest observation; documents that do not fit are dropped from its end.
        prompt_tokens: longest prompt; a longer one ends the trajectory before its first turn.
        context_tokens: longest prompt plus trajectory; must fit the engine's context.
    """

    topk: int
    searches: int
    generation_tokens: int
    observation_tokens: int
    prompt_tokens: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Action:
    """What the policy asked for in one turn; the fields mean what they mean in `Turn`.

    `finished` and `invalid` together end a trajectory whose one turn cannot be read.
    """

    query: str | None = None
    selected: tuple[int, ...] | None = None
    finished: bool = False
    invalid: bool = False
    answer: str | None = None
    note: str = ""
    fault: str = ""


Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Observation:
    """What the environment says: `head`, the `items` one per line, `tail`.

    Attributes:
        items: one rendering per retrieved document, in order, or empty; the loop drops items from the end, never a
            part of one, when the observation is too long. Text from outside must have been neutralised.
        as_user: the observation is a turn of the user: the chat template closes the policy's turn before it and opens
            another one after it. Otherwise it continues the policy's turn.
        rebuild: called with the number of items to show, returns the messages of a conversation that replaces
            everything before it; `head`, `items`' texts and `tail` are then not used, and `prompt_tokens` is the bound.
    """

    head: str
    items: tuple[str, ...] = ()
    tail: str = ""
    as_user: bool = False
    rebuild: Callable[[int], list[Message]] | None = None

    def text(self, count: int) -> str:
        """Render the observation with its first `count` items."""
        return self.head + "\n".join(self.items[:count]) + self.tail


def check_lengths(config: Any, *counts: str) -> None:
    """Check the numbers that every protocol's config has; for its `__post_init__`.

    Args:
        counts: further fields that must be at least 1.

    Raises:
        ValueError: a number that must be positive is not, or the context leaves no room behind the prompt.
    """
    for name in ("topk", "max_generation_tokens", "max_observation_tokens", "max_prompt_tokens", *counts):
        value = getattr(config, name, 1)
        if value < 1:
            raise ValueError(f"{name}={value}; expected at least 1")
    if config.max_context_tokens <= config.max_prompt_tokens:
        raise ValueError(
            f"max_context_tokens={config.max_context_tokens} leaves no token after a prompt of "
            f"max_prompt_tokens={config.max_prompt_tokens}; raise the one or lower the other"
        )
    if config.prompt not in ("published", "compact"):
        raise ValueError(f"prompt={config.prompt!r}; expected 'published' or 'compact'")


class Complete(Protocol):
    """A chat model that a grammar may ask, for example the policy itself or the frozen generator."""

    async def __call__(self, messages: Sequence[Message]) -> str:
        """Return the reply.

        Raises:
            GeneratorError, EngineError: after bounded retries.
        """
        ...


class Grammar(Protocol):
    """A search protocol; stateless, so that one instance serves all trajectories."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a generation. A turn that ends at one without an action goes on in another segment."""
        ...

    @property
    def limits(self) -> Limits:
        """What one trajectory may spend."""
        ...

    def prompt_messages(self, question: Question) -> list[Message]:
        """Return the chat messages (`role`, `content`) that open a trajectory."""
        ...

    def parse(self, question: Question, turns: Sequence[Turn], text: str) -> Action:
        """Read one turn's policy text; total, whatever the text.

        Args:
            turns: the turns before this one.
        """
        ...

    async def observe(self, question: Question, turns: Sequence[Turn], result: SearchResult | None) -> Observation:
        """Answer the last of `turns`, which is neither finished nor the last one allowed.

        Args:
            result: what the retriever returned for its query; None when it had none.
        """
        ...

    def assemble(self, question: Question, turns: Sequence[Turn]) -> tuple[Document, ...]:
        """Return the documents that the frozen generator gets, in order, without duplicates."""
        ...
