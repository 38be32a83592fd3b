"""A tokenizer of characters, an engine that plays a script, and a search over a dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from verl.agent.protocols import Generation, Sampling
from verl.errors import EngineError, RetrieverError
from verl.types import Document, Question, SearchResult

EOS = "\0"


class CharTokenizer:
    """One token per character; `EOS` is the only special one."""

    chat_template: str | None = "chat"
    eos_token = EOS
    eos_token_id = ord(EOS)

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> list[int] | str:
        """Mark up as ChatML does, with `EOS` for its end of turn."""
        assert not kwargs.pop("return_dict", False)
        turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}{EOS}\n" for m in conversation)
        if kwargs.pop("continue_final_message", False):
            text = turns.removesuffix(f"{EOS}\n")
        else:
            assert kwargs.pop("add_generation_prompt")
            text = turns + "<|im_start|>assistant\n"
        return self.encode(text, add_special_tokens=False) if kwargs["tokenize"] else text

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """Map characters to their code points."""
        assert kwargs == {"add_special_tokens": False}
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str:
        """Invert `encode`, without the special token."""
        assert kwargs["skip_special_tokens"]
        return "".join(map(chr, token_ids)).replace(EOS, "")


class ScriptedEngine:
    """Says the next line of its script at every call; an exception in the script is raised.

    A line must end at its first stop string, or with `EOS`, or run out of budget; anything else is a broken script.
    """

    def __init__(self, *script: str | Exception) -> None:
        self.script = list(script)
        self.contexts: list[str] = []
        self.samplings: list[Sampling] = []

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Say the next line, cut to the budget."""
        self.contexts.append("".join(map(chr, prompt_ids)))
        self.samplings.append(sampling)
        line = self.script.pop(0)
        if isinstance(line, Exception):
            raise line
        said = line[: sampling.max_tokens]
        ended = said.endswith((EOS, *sampling.stop))
        assert not any(stop in said[:-1] for stop in sampling.stop)
        assert ended or len(said) == sampling.max_tokens
        ids = tuple(map(ord, said))
        logprobs = tuple(-float(len(self.contexts)) for _ in ids)
        return Generation(ids, logprobs, said.replace(EOS, ""), "stop" if ended else "length", len(self.contexts))


class DictSearch:
    """Answers from a dictionary of queries; an exception in it is raised."""

    def __init__(self, results: Mapping[str, Sequence[Document] | Exception]) -> None:
        self.results = results
        self.calls: list[tuple[tuple[str, ...], int]] = []

    async def __call__(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        """Look every query up; scores count down from the number of documents."""
        self.calls.append((tuple(queries), topk))
        found = [self.results[query] for query in queries]
        for entry in found:
            if isinstance(entry, Exception):
                raise entry
        return [_result(query, entry) for query, entry in zip(queries, found, strict=True)]


def _result(query: str, documents: Sequence[Document]) -> SearchResult:
    return SearchResult(query, tuple(documents), tuple(float(len(documents) - i) for i in range(len(documents))))


def docs(*names: str) -> tuple[Document, ...]:
    """One short document per name."""
    return tuple(Document(id=name, title=f"T{name}", text=f"text {name}") for name in names)


def question(initial: Sequence[Document] = (), text: str = "Who?", id: str = "q/1") -> Question:
    """A question with the given round-0 documents."""
    return Question(id=id, text=text, answers=("x",), source="test", initial_documents=tuple(initial))


RETRIEVER_DOWN = RetrieverError("no answer from the retriever after 3 tries")
ENGINE_DOWN = EngineError("the engine died")
