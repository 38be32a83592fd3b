"""An OpenAI-compatible endpoint as a policy engine, so that a protocol can be played by a model that runs elsewhere.

Three ways to reach one. `tokens`: vLLM's `/completions`, token ids in and out. `text`: any other `/completions`, the
context as text, the reply tokenised again. `chat`: `/chat/completions`, for endpoints that offer nothing else; no
tokenizer is needed, and the policy's unfinished turn goes along as an assistant message to be continued. Replies of
the last two are good for evaluation, not for training: their ids are not those that were sampled.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import httpx

from generator_llms.retry import Malformed, Rejected, RetryPolicy, Unavailable, parse_retry_after
from verl.agent.loop import Tokenizer
from verl.agent.protocols import Generation, Sampling
from verl.errors import ConfigError, EngineError, GeneratorError

_RETRIED_STATUS = (408, 409, 425, 429)
_ROLES = ("system", "user", "assistant")
_SAMPLE = "Who wrote <query>Emma</query> in 1815?"
"""Words, a tag and a number: what different tokenizers cut differently."""
_PIECE = re.compile(r"\s*\w{1,5}|\s*[^\w\s]|\s+")


@dataclass(frozen=True)
class RemoteConfig:
    """Where a policy is served.

    Attributes:
        base_url: up to and including the version, for example `http://127.0.0.1:8000/v1`.
        model: the name to ask for.
        mode: see the module's text.
        tokenizer: folder or hub name of the model's tokenizer; not for `chat`.
        api_key_env: name of the environment variable that holds the key; it may be unset for a local endpoint.
        extra_body: further fields of every request, for example `{"continue_final_message": true}` where a chat
            endpoint has to be told to continue the assistant's words.
        concurrency: requests in flight.
        timeout_s: seconds that one request may take.
        retry_window_s: seconds during which an endpoint that is away or busy is asked again.
    """

    base_url: str
    model: str
    mode: Literal["tokens", "text", "chat"] = "tokens"
    tokenizer: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 64
    timeout_s: float = 300.0
    retry_window_s: float = 120.0

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url={self.base_url!r}; expected http://HOST:PORT/v1")
        if self.mode != "chat" and self.tokenizer is None:
            raise ValueError(f"mode={self.mode} needs the model's tokenizer; set tokenizer, or mode=chat")
        if self.concurrency < 1 or not self.timeout_s > 0 or not self.retry_window_s >= 0:
            raise ValueError("expected concurrency of at least 1, timeout_s above 0 and retry_window_s of 0 or more")


class Transcript:
    """A tokenizer for `chat`: its ids stand for short pieces of text and for roles, so messages can be read back.

    One piece has about the length of a token, so that a protocol's budgets keep their meaning roughly.
    """

    chat_template = "transcript"
    eos_token = None
    eos_token_id = None

    def __init__(self) -> None:
        self._pieces: list[str] = ["" for _ in _ROLES]
        self._ids: dict[str, int] = {}

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> list[int] | str:
        """Return the ids of the messages and of the assistant's role."""
        if not kwargs.get("tokenize", True):
            raise EngineError("a chat endpoint has no template to insert user turns into; use mode=tokens or mode=text")
        ids: list[int] = []
        for message in conversation:
            ids += [_ROLES.index(message["role"]), *self.encode(message["content"])]
        return [*ids, _ROLES.index("assistant")]

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """Cut the text into pieces."""
        return [self._id(piece) for piece in _PIECE.findall(text)]

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str:
        """Join the pieces; roles are nothing."""
        return "".join(self._pieces[token] for token in token_ids)

    def messages(self, token_ids: Sequence[int]) -> list[dict[str, str]]:
        """Return the conversation; its last message, the assistant's, is left out while it is empty."""
        starts = [at for at, token in enumerate(token_ids) if token < len(_ROLES)]
        ends = [*starts[1:], len(token_ids)]
        spoken = [
            {"role": _ROLES[token_ids[start]], "content": self.decode(token_ids[start + 1 : end])}
            for start, end in zip(starts, ends, strict=True)
        ]
        return spoken if spoken[-1]["content"] else spoken[:-1]

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            self._ids[piece] = len(self._pieces)
            self._pieces.append(piece)
        return self._ids[piece]


class RemoteEngine:
    """Generates through an endpoint; satisfies `verl.agent.protocols.PolicyEngine`. Belongs to one event loop.

    Args:
        tokenizer: the model's, or a `Transcript` for `mode=chat`.

    Raises:
        ConfigError: another kind of tokenizer than the mode needs.
    """

    def __init__(self, config: RemoteConfig, tokenizer: Tokenizer, environment: Mapping[str, str] = os.environ) -> None:
        if (config.mode == "chat") != isinstance(tokenizer, Transcript):
            raise ConfigError(f"mode={config.mode} got a {type(tokenizer).__name__}; a Transcript is for chat, only")
        self._config = config
        self._tokenizer = tokenizer
        key = environment.get(config.api_key_env)
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else None,
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=config.concurrency),
            trust_env=False,
        )
        self._slots = asyncio.Semaphore(config.concurrency)
        self._checked: asyncio.Future[list[int] | None] | None = None
        self._retry = RetryPolicy(config.retry_window_s, malformed_retries=2)

    async def __aenter__(self) -> RemoteEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Continue `prompt_ids`; log-probabilities are not a number, and the weight version is 0.

        Raises:
            EngineError: no usable reply within the retries, or the endpoint refuses the request.
        """
        path, body = self._request(prompt_ids, sampling)
        if self._config.mode == "tokens":
            await self._check_tokenizer()
        try:
            choice = await self._retry.run(lambda: self._ask(path, body), self._config.base_url, lambda: None)
            return self._generation(choice, sampling)
        except (GeneratorError, Malformed) as cause:
            raise EngineError(str(cause)) from cause

    async def _check_tokenizer(self) -> None:
        """Compare our ids of a sample text with the endpoint's, once; other servers than vLLM cannot be asked."""
        if self._checked is None:
            self._checked = asyncio.ensure_future(self._endpoint_ids())
        try:
            theirs = await asyncio.shield(self._checked)
        except httpx.TransportError:
            self._checked = None  # the request itself will say what is wrong, with its retries
            return
        ours = list(self._tokenizer.encode(_SAMPLE, add_special_tokens=False))
        if theirs is not None and theirs != ours:
            raise EngineError(
                f"{self._config.base_url} serves {self._config.model} with another tokenizer than "
                f"remote.tokenizer={self._config.tokenizer}: {theirs} and {ours} for {_SAMPLE!r}; name the tokenizer "
                "of the served model, or set mode=text"
            )

    async def _endpoint_ids(self) -> list[int] | None:
        root = self._config.base_url.rstrip("/").removesuffix("/v1")
        body = {"model": self._config.model, "prompt": _SAMPLE, "add_special_tokens": False}
        answer = await self._http.post(f"{root}/tokenize", json=body)
        try:
            tokens = answer.json()["tokens"] if answer.status_code == 200 else None
        except (ValueError, KeyError, TypeError):
            return None
        return tokens if isinstance(tokens, list) else None

    def _request(self, prompt_ids: Sequence[int], sampling: Sampling) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            "model": self._config.model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if self._config.mode == "tokens":
            body |= {"prompt": list(prompt_ids), "include_stop_str_in_output": True, "return_token_ids": True}
            if sampling.top_k > 0:
                body["top_k"] = sampling.top_k
        elif self._config.mode == "text":
            body["prompt"] = self._tokenizer.decode(prompt_ids, skip_special_tokens=False)
        else:
            assert isinstance(self._tokenizer, Transcript)
            body["messages"] = self._tokenizer.messages(prompt_ids)
        path = "chat/completions" if self._config.mode == "chat" else "completions"
        return path, {**body, **self._config.extra_body}

    async def _ask(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Send one request and return its first choice, or say whether another try may help."""
        url = f"{self._config.base_url.rstrip('/')}/{path}"
        try:
            async with self._slots, asyncio.timeout(self._config.timeout_s):
                answer = await self._http.post(url, json=body)
        except TimeoutError as cause:
            raise Unavailable(f"no reply within timeout_s={self._config.timeout_s:g}") from cause
        except httpx.TransportError as cause:
            raise Unavailable(f"{type(cause).__name__}: {cause}".rstrip(": ")) from cause
        if answer.status_code >= 500 or answer.status_code in _RETRIED_STATUS:
            wait = parse_retry_after(answer.headers.get("Retry-After"))
            raise Unavailable(f"status {answer.status_code}: {answer.text[:200]}", wait)
        if answer.status_code != 200:
            raise Rejected(f"status {answer.status_code}: {answer.text[:200]}")
        try:
            choice = json.loads(answer.content)["choices"][0]
        except (ValueError, KeyError, IndexError, TypeError) as cause:
            raise Malformed(f"the reply has no choices: {answer.text[:200]!r}") from cause
        if not isinstance(choice, Mapping):
            raise Malformed(f"the reply's choice is {type(choice).__name__}; expected an object")
        return choice

    def _generation(self, choice: Mapping[str, Any], sampling: Sampling) -> Generation:
        message, name = (choice.get("message"), "content") if self._config.mode == "chat" else (choice, "text")
        said = message.get(name) if isinstance(message, Mapping) else None
        if not isinstance(said, str):
            raise Malformed(f"the reply has no text: {str(choice)[:200]}")
        finish = "length" if choice.get("finish_reason") == "length" else "stop"
        if self._config.mode == "tokens":
            ids = choice.get("token_ids")
            if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
                raise Malformed("the reply has no token_ids; the endpoint is no vLLM, set mode=text or mode=chat")
        else:
            if finish == "stop":
                said += _missing_stop(said, choice.get("stop_reason"), sampling.stop)
            ids = self._tokenizer.encode(said, add_special_tokens=False)
        return Generation(tuple(ids), (float("nan"),) * len(ids), said, finish, 0)


def _missing_stop(text: str, reason: Any, stops: Sequence[str]) -> str:
    """Return the stop string that the endpoint cut off: the one that it names, else the one whose opening is open."""
    if isinstance(reason, str) and reason in stops:
        return "" if text.endswith(reason) else reason
    for stop in stops:
        opening = stop.replace("</", "<").replace("|end_", "|begin_")
        if opening != stop and text.rfind(opening) > text.rfind(stop):
            return stop
    return ""
