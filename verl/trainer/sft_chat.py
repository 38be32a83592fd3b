"""Which tokens of a rendered conversation the assistant wrote.

A template with generation markers says so itself. For any other, the conversation is rendered up to each assistant turn
and aligned with the whole, so that whatever the template puts before it (a default system turn, a date, an empty
thinking block) is where it would be when the model is asked to speak. A template that rewrites earlier turns later on
is refused: what would be learned is not what would be said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from verl.errors import DataError

Message = Mapping[str, Any]
Span = tuple[int, int]

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, and for each whether the assistant wrote it.

    The token that ends an assistant's turn is the assistant's; the white space which a template puts behind it is not.

    Raises:
        DataError: no assistant turn, a conversation that the template refuses, or a template whose turns cannot be told
            apart in the rendered text.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("no assistant turn; there is nothing to learn")
    template = tokenizer.get_chat_template()
    if _MARKER.search(template):
        return _marked(tokenizer, messages)
    text = _render(tokenizer, messages)
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [_turn(tokenizer, messages, turn, text) for turn in turns]
    return _tokens_of(tokenizer, text, spans)


def _turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], turn: int, text: str) -> Span:
    """Return where in the rendered `text` stands what the assistant says in turn `turn`."""
    if turn == 0:
        raise DataError("the first message is the assistant's; expected a system or user message before it")
    prompt = _render(tokenizer, messages[:turn], add_generation_prompt=True)
    if not text.startswith(prompt):
        raise _unstable(turn, _common(text, prompt), prompt, text)
    through = _render(tokenizer, messages[: turn + 1])
    if not through.startswith(prompt):
        raise _unstable(turn, _common(through, prompt), prompt, through)
    if text.startswith(through):
        return len(prompt), len(through)
    # Some templates write a last turn otherwise than an earlier one, for example with an empty thinking block.
    content = str(messages[turn]["content"]).strip()
    lead, found, tail = through[len(prompt) :].rpartition(content)
    if content and found:
        for gap in ("", lead):
            said = f"{gap}{content}{tail}"
            if text.startswith(said, len(prompt)):
                return len(prompt), len(prompt) + len(said)
    raise _unstable(turn, _common(text, through), through, text)


def _tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
    """Tokenise `text` and mark the tokens of the spans."""
    if not tokenizer.is_fast:
        raise DataError("the tokenizer gives no offsets of its tokens; use a fast one (tokenizer.json)")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    bounds = sorted({0, len(text), *(bound for span in spans for bound in span)})
    if any(start < bound < stop for bound in bounds for start, stop in offsets):
        # A prompt is tokenised before anything is said, so no token reaches over where the assistant begins or ends.
        whole = tokenizer.decode(ids)
        ids, offsets = _piecewise(tokenizer, text, bounds)
        if tokenizer.decode(ids) != whole:
            raise DataError(
                "the tokenizer joins what the assistant says to what is around it; pass token rows (input_ids, "
                "loss_mask)"
            )
    learned, special = [False] * len(ids), _special(tokenizer)
    for begin, end in spans:
        inside = [i for i, (start, stop) in enumerate(offsets) if begin <= start < stop <= end]
        for i in _without_tail(tokenizer, ids, inside, special):
            learned[i] = True
    return ids, learned


def _piecewise(tokenizer: PreTrainedTokenizerBase, text: str, bounds: Sequence[int]) -> tuple[list[int], list[Span]]:
    ids: list[int] = []
    offsets: list[Span] = []
    for begin, end in pairwise(bounds):
        encoded = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True)
        ids += encoded["input_ids"]
        offsets += [(begin + start, begin + stop) for start, stop in encoded["offset_mapping"]]
    return ids, offsets


def _without_tail(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], inside: Sequence[int], special: frozenset[int]
) -> Sequence[int]:
    """Leave out the white space behind the token that ends the turn."""
    last = max((at for at, i in enumerate(inside) if ids[i] in special), default=None)
    if last is None or tokenizer.decode([ids[i] for i in inside[last + 1 :]]).strip():
        return inside
    return inside[: last + 1]


def _marked(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Follow the template's generation markers, and take in the end of the turn if it stands just behind them."""
    # The tokenizer's own mask of assistant tokens leaves out the rest of a last character that is several tokens.
    with _refusals(messages):
        texts, spans = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    ids, learned = _tokens_of(tokenizer, texts[0], spans[0])
    if not any(learned):
        raise DataError("the template's generation markers mark no token; expected one in each assistant turn")
    special = _special(tokenizer)
    for i in range(1, len(ids)):
        if learned[i - 1] and not learned[i] and ids[i] in special and ids[i - 1] not in special:
            learned[i] = True
    return ids, learned


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    with _refusals(messages):
        return tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False, **options)


@contextmanager
def _refusals(messages: Sequence[Message]) -> Iterator[None]:
    try:
        yield
    except (TemplateError, TypeError, KeyError) as cause:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(f"the chat template refuses the turns {roles}: {cause}; change them or the template") from cause


def _special(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(tokenizer.added_tokens_decoder) | frozenset(tokenizer.all_special_ids)


def _common(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _unstable(turn: int, at: int, before: str, whole: str) -> DataError:
    return DataError(
        f"the chat template is not prefix-stable: up to turn {turn} it renders {before[at : at + 40]!r}, in the whole "
        f"conversation {whole[at : at + 40]!r} there; what is learned would not be what is said. Use a template that "
        "leaves earlier turns as they are, or pass token rows (input_ids, loss_mask)"
    )
