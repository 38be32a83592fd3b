"""What the frozen generator and the judge are asked, and what of a reply counts as the answer.

Retrieved text is quoted, never obeyed: a chat server turns the spelling of a control token inside a message into the
token itself, so control markers in documents, questions and answers are broken up by a space before they are sent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from generator_llms.config import PromptName
from verl.errors import ConfigError
from verl.types import Document, Question

Message = dict[str, str]
CountTokens = Callable[[str], int]

# The first character of: <|...|> and DeepSeek's full-width form, <s>, </s>, Gemma's turns, Llama's instruction marks,
# and the tag that delimits our answers.
_MARKER = re.compile(r"<(?=[|｜]|/?s>|(?:start|end)_of_turn>|/?answer>|<SYS>>)|\[(?=/?INST\])", re.IGNORECASE)
_CONTEXT = "Use the following contexts on demand and answer the question directly.\n\nContexts:\n"
_ZERO_SHOT = "Answer the question directly, from what you know."
_COT = (
    "Answer the question from what you know. Think it through step by step first, then give the final answer, as "
    "short as it can be, between <answer> and </answer>."
)
_JUDGE = (
    "You check answers. Decide whether the response states at least one of the accepted answers, in any wording. "
    "Reply with one word, yes or no."
)
_JUDGE_AGAIN = "Reply with exactly one word: yes or no."
_BYTES_PER_TOKEN = 3
_TEMPLATE_TOKENS = 32


def build(name: PromptName, question: Question, documents: Sequence[Document]) -> list[Message]:
    """Return the messages that ask `question`; only the prompt "context" shows the documents."""
    if name == "zero_shot":
        return _chat(_ZERO_SHOT, question)
    if name == "cot":
        return _chat(_COT, question)
    return _chat(_CONTEXT + render(documents).rstrip(), question)


def render(documents: Sequence[Document]) -> str:
    """Render documents as the generator reads them, numbered from 1."""
    return "".join(_block(number, document) for number, document in enumerate(documents, start=1))


def fit(
    question: Question, documents: Sequence[Document], max_prompt_tokens: int, count_tokens: CountTokens
) -> tuple[Document, ...]:
    """Return the longest run of first documents with which the context prompt stays within its bound.

    Documents are kept or left out as a whole. None may remain: the question is then asked with an empty context.
    """
    left = max_prompt_tokens - prompt_overhead(question, count_tokens)
    kept = []
    for number, document in enumerate(documents, start=1):
        left -= count_tokens(_block(number, document))
        if left < 0:
            break
        kept.append(document)
    return tuple(kept)


def prompt_overhead(question: Question, count_tokens: CountTokens) -> int:
    """Return the tokens of the context prompt without documents, chat template included."""
    return _TEMPLATE_TOKENS + count_tokens(_CONTEXT) + count_tokens(question.text)


def final_answer(text: str) -> str:
    """Return what follows the last `<answer>`, up to `</answer>` or the end; the whole text where there is no tag.

    A model that quotes its evidence first is thus judged on its answer alone.
    """
    _, tag, tail = text.rpartition("<answer>")
    return (tail.partition("</answer>")[0] if tag else text).strip()


def neutralise(text: str) -> str:
    """Break up control markers by a space, and replace lone surrogates, which no request can carry."""
    if not text.isascii():
        text = text.encode("utf-8", errors="replace").decode("utf-8")
    if "<" not in text and "[" not in text:  # nearly always, and this runs on every document of every question
        return text
    return _MARKER.sub(r"\g<0> ", text)


def judge_messages(question: Question, answer: str, show_question: bool) -> list[Message]:
    """Return the messages that ask whether `answer` states one of the question's golds."""
    lines = [f"Question: {question.text}"] if show_question else []
    lines += [f"Accepted answers: {'; '.join(question.answers)}", f"Response: {answer}"]
    return [_message("system", _JUDGE), _message("user", neutralise("\n".join(lines)))]


def judge_again(messages: Sequence[Message], reply: str) -> list[Message]:
    """Return the conversation that asks the judge once more, after a reply that was neither yes nor no."""
    return [*messages, _message("assistant", neutralise(reply)), _message("user", _JUDGE_AGAIN)]


def estimate_tokens(text: str) -> int:
    """Return more tokens than current tokenizers make of ordinary prose: one for every three UTF-8 bytes."""
    return math.ceil(len(text.encode("utf-8", errors="replace")) / _BYTES_PER_TOKEN)


def load_token_counter(folder: Path) -> CountTokens:
    """Return an exact counter from a folder with `tokenizer.json`.

    Raises:
        ConfigError: the folder has no such file.
    """
    from tokenizers import Tokenizer  # costs a moment, and most callers estimate

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"tokenizer={folder}: no tokenizer.json there; name the folder of a fast tokenizer, or null")
    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _block(number: int, document: Document) -> str:
    title = neutralise(document.title).replace("\n", " ")
    return f"Doc {number} (Title: {title})\n{neutralise(document.text)}\n\n"


def _chat(system: str, question: Question) -> list[Message]:
    return [_message("system", system), _message("user", neutralise(question.text))]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
