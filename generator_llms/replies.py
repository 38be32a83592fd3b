"""What an OpenAI-compatible endpoint replied, checked field by field before anything is believed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from generator_llms.retry import Malformed, Rejected

_SHOWN_CHARS = 200


@dataclass(frozen=True, slots=True)
class Completion:
    """A reply.

    Attributes:
        finish: why it ended: `"stop"`, `"length"` or what else the endpoint says.
        logprobs: log-probability of each token of `text`, if they were asked for, else empty.
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
        return json.dumps({key: value for key, value in asdict(self).items() if key != "cached"})

    @classmethod
    def from_json(cls, text: str) -> Completion:
        """Read what `to_json` wrote, marked as cached."""
        fields = json.loads(text)
        return cls(**{**fields, "logprobs": tuple(fields["logprobs"])}, cached=True)


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
    """Read a chat completion.

    Args:
        model: the model that must have answered (a dated version of it will do); None accepts any.
        max_chars: longest reply that is believed.
        logprobs: whether log-probabilities were asked for.

    Raises:
        Malformed: a part is missing or of the wrong kind; another try may help.
        Rejected: another model answered, or it refused; another try will not help.
    """
    if not isinstance(payload, Mapping):
        raise Malformed(f"expected a JSON object, got {shorten(repr(payload))}")
    _check_model(payload.get("model"), model)
    choice = _first_choice(payload)
    message = choice.get("message")
    if not isinstance(message, Mapping):
        raise Malformed(f"the choice has no message: {shorten(repr(choice))}")
    finish = choice.get("finish_reason")
    refusal = message.get("refusal")
    if refusal or finish == "content_filter":
        raise Rejected(f"the model refused: {shorten(str(refusal or finish))}; there is no answer to judge")
    usage = payload.get("usage")
    return Completion(
        text=_text(message, max_chars),
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        finish=finish if isinstance(finish, str) else "",
        logprobs=_logprobs(choice) if logprobs else (),
    )


def shorten(text: str) -> str:
    """Cut what goes into a message of ours."""
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"


def _check_model(answered: Any, expected: str | None) -> None:
    if expected is None or answered is None:
        return
    if not isinstance(answered, str) or not answered.startswith(expected):
        raise Rejected(
            f"model {answered!r} answered, expected {expected!r}; start the generator with the model that the "
            "configuration names, or set check_model=false if the endpoint renames its models"
        )


def _first_choice(payload: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = payload.get("choices")
    if not isinstance(choices, Sequence) or not choices or not isinstance(choices[0], Mapping):
        raise Malformed(f"the reply has no choices: {shorten(repr(payload))}")
    return choices[0]


def _text(message: Mapping[str, Any], max_chars: int) -> str:
    text = message.get("content")
    if not isinstance(text, str):
        raise Malformed(f"the message has no text: {shorten(repr(message))}")
    if len(text) > max_chars:
        raise Malformed(f"the reply has {len(text)} characters, more than max_reply_chars={max_chars}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as cause:
        raise Malformed(f"the reply is not valid Unicode: {cause}") from cause
    return text


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) else 0


def _logprobs(choice: Mapping[str, Any]) -> tuple[float, ...]:
    block = choice.get("logprobs")
    entries = block.get("content") if isinstance(block, Mapping) else None
    if not isinstance(entries, list):
        raise Malformed("the reply has no log-probabilities although they were asked for")
    try:
        return tuple(float(entry["logprob"]) for entry in entries)
    except (KeyError, TypeError, ValueError) as cause:
        raise Malformed(f"the reply's log-probabilities cannot be read: {cause!r}") from cause
