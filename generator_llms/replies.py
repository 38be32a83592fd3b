"""What an OpenAI-compatible endpoint replied, checked field by field before anything is believed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from generator_llms.retry import Malformed, Rejected

_SHOWN_CHARS = 200
_DATED = r"([-@]\d{4}.*)?"  # as in gpt-4o-2024-08-06, but not as in gpt-4-turbo where gpt-4 was asked for
_ROUNDING = 1e-3  # by which float32 lets a certain token exceed 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A reply.

    Attributes:
        finish: why it ended: `"stop"`, `"length"` or what else the endpoint says.
        logprobs: natural log-probability of each token that was generated, if they were asked for, else empty.
        prompt_tokens, completion_tokens: as the endpoint counted them; 0 where it does not say.
        cached: whether it came from the cache.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: str = ""
    logprobs: tuple[float, ...] = ()
    cached: bool = False

    def to_json(self) -> str:
        """Serialise for the cache; `from_json` inverts it."""
        stored = (field.name for field in fields(self) if field.name != "cached")
        return json.dumps({name: getattr(self, name) for name in stored})

    @classmethod
    def from_json(cls, text: str) -> Completion:
        """Read what `to_json` wrote, marked as cached.

        Raises:
            ValueError: `text` is something else.
        """
        stored = json.loads(text)
        try:
            completion = cls(**{**stored, "logprobs": tuple(stored["logprobs"])}, cached=True)
        except (TypeError, KeyError) as cause:
            raise ValueError(f"expected a reply, got {shorten(text)}") from cause
        if not isinstance(completion.text, str):
            raise ValueError(f"expected a reply with a text, got {shorten(text)}")
        return completion


@dataclass(frozen=True, slots=True)
class Sample:
    """A sampled reply; `logprobs` is the log-probability of each of its tokens, the end token's included if sent."""

    text: str
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that the endpoint offers; `max_model_len` in tokens, None if it does not say (vLLM does)."""

    name: str
    max_model_len: int | None


def decode_body(body: bytes) -> Any:
    """Decode a JSON body.

    Raises:
        Malformed: it is not UTF-8, or not JSON.
    """
    try:
        return json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as cause:
        raise Malformed(f"the body is not UTF-8: {cause}") from cause
    except (json.JSONDecodeError, RecursionError) as cause:
        raise Malformed(f"the body is not JSON ({cause}): {shorten(repr(body))}") from cause


def read_models(payload: Any) -> list[ServedModel]:
    """Read the list of served models.

    Raises:
        Malformed: it is not such a list, or an empty one.
    """
    entries = payload.get("data") if isinstance(payload, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise Malformed(f"expected a list of models under 'data', got {shorten(repr(payload))}")
    models = []
    for entry in entries:
        name = entry.get("id") if isinstance(entry, Mapping) else None
        if not isinstance(name, str):
            raise Malformed(f"expected models with an 'id', got {shorten(repr(entry))}")
        length = entry.get("max_model_len")
        models.append(ServedModel(name, length if isinstance(length, int) else None))
    return models


def read_completion(payload: Any, model: str | None, max_chars: int, logprobs: bool) -> Completion:
    """Read a chat completion or a plain one.

    Args:
        model: the model that must have answered (a dated version of it will do); None accepts any.
        max_chars: longest reply that is believed.
        logprobs: whether log-probabilities were asked for.

    Raises:
        Malformed: a part is missing or of the wrong kind; another try may help.
        Rejected: another model answered, or it refused; another try will not help.
    """
    payload = checked_object(payload)
    check_model(payload.get("model"), model)
    choice = _first_choice(payload)
    message = choice.get("message")
    if message is not None and not isinstance(message, Mapping):
        raise Malformed(f"the choice has no message: {shorten(repr(choice))}")
    finish = choice.get("finish_reason")
    refusal = message.get("refusal") if message else None
    if refusal or finish == "content_filter":
        raise Rejected(f"the model refused: {shorten(str(refusal or finish))}; there is no answer to judge")
    usage = payload.get("usage")
    return Completion(
        text=checked_text(message.get("content") if message else choice.get("text"), max_chars, choice),
        prompt_tokens=count_of(usage, "prompt_tokens"),
        completion_tokens=count_of(usage, "completion_tokens"),
        finish=finish if isinstance(finish, str) else "",
        logprobs=_logprobs(choice) if logprobs else (),
    )


def read_tokens(payload: Any) -> list[int]:
    """Read the ids that vLLM's `/tokenize` returned.

    Raises:
        Malformed: there are none.
    """
    tokens = payload.get("tokens") if isinstance(payload, Mapping) else None
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise Malformed(f"expected token ids under 'tokens', got {shorten(repr(payload))}")
    return tokens


def read_scored(payload: Any, model: str | None, ids: Sequence[int], count: int) -> Completion:
    """Read the log-probabilities that vLLM's `prompt_logprobs` gives for the last `count` of the prompt's `ids`.

    Raises:
        Malformed: some are missing, or belong to other ids.
        Rejected: another model answered.
    """
    payload = checked_object(payload)
    check_model(payload.get("model"), model)
    entries = _first_choice(payload).get("prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(ids):
        raise Malformed(
            f"expected prompt_logprobs of {len(ids)} tokens, got {shorten(repr(entries))}; only vLLM is known to "
            "give them"
        )
    try:
        wanted = zip(ids[-count:], entries[-count:], strict=True)
        logprobs = tuple(float(entry[str(token)]["logprob"]) for token, entry in wanted)
    except (KeyError, TypeError, ValueError) as cause:
        raise Malformed(f"the prompt's log-probabilities cannot be read: {cause!r}") from cause
    _check_finite(logprobs)
    return Completion(text="", prompt_tokens=count_of(payload.get("usage"), "prompt_tokens"), logprobs=logprobs)


def checked_object(payload: Any) -> Mapping[str, Any]:
    """Return `payload`.

    Raises:
        Malformed: it is not a JSON object.
    """
    if not isinstance(payload, Mapping):
        raise Malformed(f"expected a JSON object, got {shorten(repr(payload))}")
    return payload


def check_model(answered: Any, expected: str | None) -> None:
    """Accept the expected model or a dated version of it; anything where `expected` or `answered` is None.

    Raises:
        Rejected: another model answered.
    """
    if expected is None or answered is None:
        return
    if not isinstance(answered, str) or not re.fullmatch(re.escape(expected) + _DATED, answered):
        raise Rejected(
            f"model {answered!r} answered, expected {expected!r}; start the generator with the model that the "
            "configuration names, or set check_model=false if the endpoint renames its models"
        )


def checked_text(text: Any, max_chars: int, source: Any) -> str:
    """Return a reply's text.

    Args:
        source: what held it, for the message.

    Raises:
        Malformed: it is not a string, longer than `max_chars`, or not valid Unicode.
    """
    if not isinstance(text, str):
        raise Malformed(f"the reply has no text: {shorten(repr(source))}")
    if len(text) > max_chars:
        raise Malformed(f"the reply has {len(text)} characters, more than max_reply_chars={max_chars}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as cause:
        raise Malformed(f"the reply is not valid Unicode: {cause}") from cause
    return text


def count_of(usage: Any, name: str) -> int:
    """Return a count of tokens, 0 where the endpoint does not give it."""
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) and value > 0 else 0


def shorten(text: str) -> str:
    """Cut what goes into a message of ours."""
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"


def _first_choice(payload: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = payload.get("choices")
    if not isinstance(choices, Sequence) or not choices or not isinstance(choices[0], Mapping):
        raise Malformed(f"the reply has no choices: {shorten(repr(payload))}")
    return choices[0]


def _logprobs(choice: Mapping[str, Any]) -> tuple[float, ...]:
    """Read them from a chat choice (`content`) or a plain one (`token_logprobs`)."""
    block = choice.get("logprobs")
    block = block if isinstance(block, Mapping) else {}
    entries, values = block.get("content"), block.get("token_logprobs")
    if not isinstance(entries, list) and not isinstance(values, list):
        raise Malformed("the reply has no log-probabilities although they were asked for")
    try:
        logprobs = tuple(float(value) for value in values or (entry["logprob"] for entry in entries or ()))
    except (KeyError, TypeError, ValueError) as cause:
        raise Malformed(f"the reply's log-probabilities cannot be read: {cause!r}") from cause
    _check_finite(logprobs)
    return logprobs


def _check_finite(logprobs: Sequence[float]) -> None:
    if not all(math.isfinite(logprob) and logprob <= _ROUNDING for logprob in logprobs):
        raise Malformed(f"the log-probabilities are no finite numbers of at most 0: {shorten(repr(logprobs))}")
