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
from generator_llms.options import chosen_option
from verl.errors import ConfigError
from verl.types import Document, Question

Message = dict[str, str]
CountTokens = Callable[[str], int]

# The first character of: <|...|> and DeepSeek's full-width form, <s>, </s>, Gemma's turns, Llama's instruction marks,
# and the tag that delimits our answers.
_MARKER = re.compile(r"<(?=[|｜]|/?s>|(?:start|end)_of_turn>|/?answer>|<SYS>>)|\[(?=/?INST\])", re.IGNORECASE)
_CONTEXTS = "\n\nContexts:\n"
_INSTRUCTIONS: dict[PromptName, str] = {
    "context": "Use the following contexts on demand and answer the question directly.",
    "zero_shot": "Answer the question directly, from what you know.",
    "cot": (
        "Answer the question from what you know. Think it through step by step first, then give the final answer, as "
        "short as it can be, between <answer> and </answer>."
    ),
    "strict_span": (
        "Find the answer to the question in the following contexts. Reply with the answer alone: the shortest stretch "
        "of words that answers it, copied as it stands there, without a sentence around it and without an explanation."
    ),
    "choice": (
        "The question below ends with lettered options, of which one is right. Use the contexts on demand, if there "
        "are any. Give the letter and the text of the right option between <answer> and </answer>, for example "
        "<answer>B: text of option B</answer>."
    ),
}
_SHOW_DOCUMENTS = ("context", "strict_span", "choice")
_JUDGE = (
    "You check answers. Decide whether the response states at least one of the accepted answers, in any wording. "
    "Reply with one word, yes or no."
)
_JUDGE_AGAIN = "Reply with exactly one word: yes or no."
_BYTES_PER_TOKEN = 3
_TEMPLATE_TOKENS = 32
_SPEAKERS = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
PLAIN_STOPS = ("\nUser:", "\nAssistant:")
"""Where the reply to a plain text ends: a base model would go on with the next turn."""


def build(name: PromptName, question: Question, documents: Sequence[Document]) -> list[Message]:
    """Return the messages that ask `question`; prompts that do not show documents leave them out."""
    return _chat(_system(name, render(documents).rstrip() if shows_documents(name) else ""), question)


def shows_documents(name: PromptName) -> bool:
    """Tell whether a prompt shows the documents that are given with a question."""
    return name in _SHOW_DOCUMENTS


def plain(messages: Sequence[Message]) -> str:
    """Return a conversation as text that a base model goes on from."""
    turns = [_SPEAKERS[message["role"]] + message["content"] for message in messages]
    return "\n\n".join([*turns, "Assistant:"])


def render(documents: Sequence[Document]) -> str:
    """Render documents as the generator reads them, numbered from 1."""
    return "".join(_block(number, document) for number, document in enumerate(documents, start=1))


def build_within(
    name: PromptName, question: Question, documents: Sequence[Document], room: int, count_tokens: CountTokens
) -> tuple[list[Message], int]:
    """Return the messages that ask `question`, with the longest run of first documents that fits into `room`.

    Documents are kept or left out as a whole. None may remain: the question is then asked with an empty context.

    Args:
        room: tokens that the documents may take.

    Returns:
        The messages, and how many documents they show.
    """
    blocks: list[str] = []
    for number, document in enumerate(documents if shows_documents(name) else (), start=1):
        block = _block(number, document)
        room -= count_tokens(block)
        if room < 0:
            break
        blocks.append(block)
    return _chat(_system(name, "".join(blocks).rstrip()), question), len(blocks)


def prompt_overhead(name: PromptName, question: Question, count_tokens: CountTokens) -> int:
    """Return the tokens of a prompt without documents, chat template included."""
    return _TEMPLATE_TOKENS + count_tokens(_INSTRUCTIONS[name] + _CONTEXTS) + count_tokens(question.text)


def read_answer(name: PromptName, question: Question, reply: str) -> str:
    """Return what of a reply counts as the answer to a prompt; of `choice`, the option as the question words it."""
    answer = final_answer(reply)
    return chosen_option(question.text, answer) or answer if name == "choice" else answer


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
    size = len(text) if text.isascii() else len(text.encode("utf-8", errors="replace"))
    return math.ceil(size / _BYTES_PER_TOKEN)


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


def _system(name: PromptName, contexts: str) -> str:
    # A choice can do without documents; the other two say so when there are none.
    announced = bool(contexts) or name in ("context", "strict_span")
    return _INSTRUCTIONS[name] + (_CONTEXTS + contexts if announced else "")


def _chat(system: str, question: Question) -> list[Message]:
    return [_message("system", system), _message("user", neutralise(question.text))]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
