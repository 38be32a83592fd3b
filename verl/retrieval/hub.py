"""Files of the Hugging Face hub: what a repository holds, and fetching one file so that nothing is fetched twice.

The transfer is our own because `huggingface_hub` 1.33 drops what it has when it is interrupted and never compares the
checksum, which for a file of 40 GB is not good enough. Listing, addresses and the token are the library's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import httpx
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from verl.errors import DataError

logger = logging.getLogger(__name__)

RepoKind = Literal["dataset", "model"]

_CHUNK = 4 << 20
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a transfer goes on when the network does not.

    Attributes:
        timeout_s: silence after which a connection counts as lost.
        attempts: tries in a row that may bring nothing.
        backoff_s: wait before the second try; doubles with every further one.
        max_backoff_s: longest wait.
    """

    timeout_s: float = 30.0
    attempts: int = 6
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0

    def wait(self, failures: int, asked_s: float = 0.0) -> None:
        """Sleep after so many failures in a row, at least for as long as the server asked."""
        time.sleep(min(max(self.backoff_s * 2 ** (failures - 1), asked_s), self.max_backoff_s))


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository at one revision.

    Attributes:
        name: path inside the repository.
        digest: sha256 of the content where git LFS keeps the file, else the sha1 of git's blob.
    """

    name: str
    url: str
    bytes: int
    digest: str

    def matches(self, path: Path, offset: int = 0) -> bool:
        """Whether `path` holds this file's content from byte `offset` on."""
        if path.stat().st_size - offset < self.bytes:
            return False
        blob = len(self.digest) == 40
        found = hashlib.sha1(b"blob %d\0" % self.bytes) if blob else hashlib.sha256()
        left = self.bytes
        name = f"checking {path.name}"
        with path.open("rb") as file, tqdm(total=left, desc=name, unit="B", unit_scale=True, delay=2) as progress:
            file.seek(offset)
            while left and (chunk := file.read(min(_CHUNK, left))):
                found.update(chunk)
                left -= len(chunk)
                progress.update(len(chunk))
        return found.hexdigest() == self.digest

    def is_at(self, path: Path) -> bool:
        """Whether `path` holds this file's content and nothing else."""
        return path.stat().st_size == self.bytes and self.matches(path)

    def partial(self, target: Path) -> Path:
        """Return where the bytes are kept until all are there; names the content, so only its own are continued."""
        return target.with_name(f"{target.name}.{self.digest[:12]}.partial")


def list_files(
    repo: str, kind: RepoKind, endpoint: str | None = None, patience: Patience | None = None
) -> tuple[RemoteFile, ...]:
    """Return the files of a repository at its newest revision, all of one and the same.

    Args:
        endpoint: address of the hub; that of the environment variable `HF_ENDPOINT`, or the public one, when None.

    Raises:
        DataError: no such repository, no access, or no answer.
    """
    patience = patience or Patience()
    for attempt in range(1, patience.attempts + 1):
        try:
            info = HfApi(endpoint=endpoint).repo_info(
                repo, repo_type=kind, files_metadata=True, timeout=patience.timeout_s
            )
            return tuple(
                _remote_file(repo, kind, endpoint, str(info.sha), entry.rfilename, entry.size, _digest(entry))
                for entry in info.siblings or ()
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{kind} {repo}: the answer is no hub's ({error}); check HF_ENDPOINT") from error
        except (httpx.TransportError, HfHubHTTPError, OfflineModeIsEnabled) as error:
            if attempt == patience.attempts or not _may_pass(error):
                raise DataError(f"{kind} {repo}: {_reason(error)}") from error
            logger.warning("%s %s: %s; trying again", kind, repo, _reason(error))
            patience.wait(attempt)
    raise AssertionError("attempts is at least 1")


def fetch(file: RemoteFile, target: Path, patience: Patience | None = None) -> None:
    """Fetch a file; `target` appears only when its size and checksum are right.

    What came of it before, in this run or in one that was killed, is not asked for again.

    Raises:
        DataError: the server refuses, sends something else, or falls silent too often; or the disk is full.
    """
    patience = patience or Patience()
    partial = file.partial(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        if partial.stat().st_size > file.bytes:
            os.truncate(partial, 0)
        _transfer(file, partial, patience)
        if not file.is_at(partial):
            partial.unlink()
            raise DataError(f"{file.url}: what came has another checksum than the hub says; try again")
        os.replace(partial, target)
    except OSError as error:
        raise DataError(f"cannot write {partial} ({error}); free some space and run again to go on") from error


def _transfer(file: RemoteFile, partial: Path, patience: Patience) -> None:
    """Append to `partial` until all bytes are there."""
    failures = 0
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    done = partial.stat().st_size
    with (
        httpx.Client(headers=headers, timeout=patience.timeout_s, follow_redirects=True) as client,
        tqdm(total=file.bytes, initial=done, desc=file.name, unit="B", unit_scale=True, mininterval=1) as progress,
    ):
        while done < file.bytes:
            asked_s = 0.0
            try:
                _stream(client, file, partial, done, progress)
                reason = "the connection ended early"
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
            except _Busy as busy:
                reason, asked_s = str(busy), busy.retry_after_s
            former, done = done, partial.stat().st_size
            progress.update(done - progress.n)
            if done >= file.bytes:
                break
            failures = 0 if done > former else failures + 1
            if failures >= patience.attempts:
                raise DataError(f"{file.url}: {reason} ({done} of {file.bytes} bytes are here); run again to go on")
            logger.warning("%s: %s (%d of %d bytes are here); going on", file.name, reason, done, file.bytes)
            patience.wait(max(failures, 1), asked_s)


def _stream(client: httpx.Client, file: RemoteFile, partial: Path, done: int, progress: tqdm) -> None:
    with client.stream("GET", file.url, headers={"Range": f"bytes={done}-"} if done else {}) as response:
        if response.status_code in _BUSY:
            raise _Busy(response)
        if response.status_code not in (200, 206):
            raise DataError(f"{file.url}: status {response.status_code} {response.reason_phrase}; expected the file")
        start, size = _extent(response.headers, response.status_code == 206)
        if size not in (None, file.bytes):
            raise DataError(f"{file.url}: the server sends a file of {size} bytes, expected {file.bytes}")
        if start not in (0, done):
            raise DataError(f"{file.url}: the server sends the bytes from {start} on, expected from {done} on")
        with partial.open("r+b") as target:
            target.truncate(start)  # a server that knows no ranges starts at 0 again
            target.seek(start)
            for chunk in response.iter_raw():
                target.write(chunk)
                progress.update(len(chunk))
                if target.tell() > file.bytes:
                    target.truncate(0)
                    raise DataError(f"{file.url}: the server sends more than the {file.bytes} bytes that were expected")


class _Busy(Exception):
    """The server cannot answer now."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"status {response.status_code} {response.reason_phrase}")
        value = response.headers.get("Retry-After", "")
        self.retry_after_s = float(value) if value.isascii() and value.isdigit() else 0.0


def _extent(headers: Mapping[str, str], ranged: bool) -> tuple[int, int | None]:
    """Return where the answer starts in the file and how long the file is, None where the server does not say."""
    if not ranged:
        length = headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    span, _, size = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    start = span.partition("-")[0]
    return int(start) if start.isdecimal() else -1, int(size) if size.isdecimal() else None


def _remote_file(
    repo: str, kind: RepoKind, endpoint: str | None, revision: str, name: str, size: int | None, digest: str | None
) -> RemoteFile:
    if size is None or not digest:
        raise DataError(f"{kind} {repo}: the hub gives no size or checksum of {name}; set HF_ENDPOINT to one that does")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DataError(f"{kind} {repo}: refusing the file name {name!r}, which leads out of the folder")
    url = hf_hub_url(repo, name, repo_type=kind, revision=revision, endpoint=endpoint)
    return RemoteFile(name, url, size, digest)


def _digest(entry: object) -> str | None:
    lfs = getattr(entry, "lfs", None)
    return lfs.sha256 if lfs else getattr(entry, "blob_id", None)


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _BUSY
    return isinstance(error, httpx.TransportError)


def _reason(error: Exception) -> str:
    """Say in one line why the hub gave no listing, and what helps."""
    if isinstance(error, GatedRepoError):
        return "access must be granted on its page; do that and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or a private one; check the name, or log in with `hf auth login`"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids to ask the hub; unset it"
    reason = str(error).strip().partition("\n")[0]
    return f"{reason or type(error).__name__}; check the network, or set HF_ENDPOINT to a mirror"
