"""The two ways to an endpoint: plain HTTP, and a vendor's SDK where signing requests is the vendor's business."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from generator_llms.backend import failure
from generator_llms.replies import shorten
from generator_llms.retry import Malformed, Rejected, Unavailable

if TYPE_CHECKING:
    import aiohttp

# Below the 5 s after which uvicorn, and so vLLM, hangs up on an idle connection: a request never meets one that closes.
_KEEPALIVE_S = 4.0


class HttpWire:
    """JSON over aiohttp, whose cost per request is a tenth of what the vendors' SDKs spend.

    Args:
        key: sent as a bearer token.
        trust_env: go through the proxy that the environment names.
    """

    def __init__(self, base_url: str, key: str, trust_env: bool) -> None:
        self.where = base_url
        self._base_url = base_url.rstrip("/")
        self._key = key
        self._trust_env = trust_env
        self._session: aiohttp.ClientSession | None = None

    async def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """See `Wire`."""
        return await self._exchange("POST", path, json.dumps(body, allow_nan=False).encode("ascii"))

    async def get(self, path: str) -> bytes:
        """See `Wire`."""
        return await self._exchange("GET", path, None)

    async def aclose(self) -> None:
        """See `Wire`."""
        if self._session is not None:
            await self._session.close()

    async def _exchange(self, method: str, path: str, data: bytes | None) -> bytes:
        import aiohttp  # a fifth of a second, and a replayed run needs none of it

        if self._session is None:
            self._session = self._open()
        url = path if path.startswith("http") else self._base_url + path
        try:
            # A redirect would turn the POST into a GET and might carry the key elsewhere.
            async with self._session.request(method, url, data=data, allow_redirects=False) as response:
                content = await response.read()
        except aiohttp.InvalidURL as cause:
            raise Rejected(f"{url} is no address: {cause}") from cause
        except (aiohttp.ClientError, OSError) as cause:
            raise Unavailable(f"{type(cause).__name__}: {shorten(str(cause))}") from cause
        if response.status != 200:
            raise failure(response.status, content, response.headers.get("Retry-After"), self._key)
        return content

    def _open(self) -> aiohttp.ClientSession:
        import aiohttp

        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),  # requests are bounded elsewhere
            headers={"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"},
            timeout=aiohttp.ClientTimeout(total=None),  # ours bounds the request as a whole
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=self._trust_env,
        )


class SdkWire:
    """A client of the openai or anthropic SDK, which share their design; it adds the credentials to each request.

    Args:
        client: made with `max_retries=0` and no timeout: ours are bounded by time, so that a generator can be
            restarted under a running job, and bound a request as a whole.
        sdk: the module that `client` and its exceptions are from.
        credential_errors: what signing a request raises when it finds no credentials.
    """

    def __init__(
        self,
        where: str,
        client: Any,
        sdk: ModuleType,
        secret: str,
        credential_errors: tuple[type[Exception], ...] = (),
    ) -> None:
        self.where = where
        self._client = client
        self._sdk = sdk
        self._secret = secret
        self._credential_errors = credential_errors
        # The SDKs' transport logs every request at INFO, thousands of lines per training step.
        logging.getLogger("httpx2").setLevel(logging.WARNING)

    async def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """See `Wire`."""
        import httpx2

        return await self._sent(lambda: self._client.post(path, cast_to=httpx2.Response, body=dict(body)))

    async def get(self, path: str) -> bytes:
        """See `Wire`."""
        import httpx2

        return await self._sent(lambda: self._client.get(path, cast_to=httpx2.Response))

    async def aclose(self) -> None:
        """See `Wire`."""
        await self._client.close()

    async def _sent(self, call: Callable[[], Awaitable[Any]]) -> bytes:
        base = self._sdk.OpenAIError if self._sdk.__name__ == "openai" else self._sdk.AnthropicError
        try:
            return (await call()).content
        except self._sdk.APIStatusError as cause:
            response = cause.response
            retry_after = response.headers.get("retry-after")
            # Without the SDK's own error, which quotes the body as it came, with the key if that was in it.
            raise failure(response.status_code, response.content, retry_after, self._secret) from None
        except self._sdk.APIConnectionError as cause:
            raise Unavailable(f"{cause} ({shorten(repr(cause.__cause__))})") from cause
        except base as cause:
            raise Malformed(shorten(str(cause))) from cause
        except self._credential_errors as cause:
            raise Rejected(f"the request cannot be signed: {shorten(str(cause))}; provide AWS credentials") from cause
