"""The vectors of a corpus in a file: encoded resumably, memory-mapped when read.

A folder holds `vectors.memmap`, the raw numbers in corpus order (the published form of embeddings), and `vectors.json`,
which says whose they are and how many of the rows count. Rows are appended and brought to the disk before the json
file says so, and that file is replaced as a whole: a run that is killed at any point loses a few seconds of work, and
the next one goes on where the json file stands. The encoder gets the same chunks of documents either way, so the file
is the one that an unbroken run writes.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from tqdm import tqdm

from verl.errors import ConfigError, DataError, RetrieverError
from verl.retrieval.corpus import Corpus
from verl.retrieval.encoder_spec import EncoderSpec, Setting, spec_settings
from verl.typed import Decoder

if TYPE_CHECKING:  # torch and transformers take seconds, and reading vectors needs neither
    from verl.retrieval.encoder import Tokens

logger = logging.getLogger(__name__)

StoredDtype = Literal["float32", "float16"]

VECTORS_NAME = "vectors.memmap"
INFO_NAME = "vectors.json"
_LOCK_NAME = "vectors.lock"
_FORMAT = 1
_SAME_VECTOR = 0.01
"""Distance of a vector from the stored one, relative to its length, up to which one model is taken to have made both:
half precision leaves 0.002, another model (even of the same training run) leaves far more."""


class PassageEncoder(Protocol):
    """What `encode_corpus` needs of `verl.retrieval.encoder.Encoder`."""

    spec: EncoderSpec
    width: int
    precision: str
    chunk_documents: int

    def tokenize_passages(self, passages: Sequence[str]) -> Tokens:
        """Turn texts into tokens; called from another thread."""
        ...

    def encode_tokens(self, tokens: Tokens) -> np.ndarray:
        """Return (passages, D) float32."""
        ...


@dataclass(frozen=True, slots=True)
class VectorsInfo:
    """The `vectors.json` of a folder.

    Attributes:
        corpus: fingerprint of the corpus.
        documents: number of documents in the corpus.
        start: first row of the corpus that the file holds.
        stop: row of the corpus after the last one that the file will hold.
        width: numbers of a vector, D.
        dtype: of the numbers in the file.
        precision: in which numbers the encoder computed.
        encoder: its spec, as `spec_settings` gives it.
        rows: how many rows are finished.
        truncated: how many of their passages were cut at the encoder's length.
    """

    corpus: str
    documents: int
    start: int
    stop: int
    width: int
    dtype: StoredDtype
    precision: str
    encoder: Mapping[str, Setting]
    rows: int = 0
    truncated: int = 0
    format: int = _FORMAT

    @property
    def row_bytes(self) -> int:
        """Bytes of one vector in the file."""
        return self.width * np.dtype(self.dtype).itemsize

    @property
    def finished(self) -> bool:
        """Whether every row is there."""
        return self.rows == self.stop - self.start

    def save(self, folder: Path) -> None:
        """Write `vectors.json` so that it is there as a whole or not at all, also after a power failure."""
        temporary = folder / f"{INFO_NAME}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / INFO_NAME)
        _sync_folder(folder)

    @classmethod
    def load(cls, folder: Path) -> VectorsInfo | None:
        """Read `vectors.json`; None where there is none.

        Raises:
            DataError: it is malformed, or of another format.
        """
        path = folder / INFO_NAME
        try:
            info = Decoder(error=DataError).decode(cls, json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, DataError) as error:
            raise DataError(f"{path} cannot be read ({error}); pass another folder, or overwrite it") from error
        if info.format != _FORMAT:
            raise DataError(f"{path} has format {info.format}, expected {_FORMAT}; encode the corpus again")
        return info


def encode_corpus(
    corpus: Corpus,
    encoder: PassageEncoder,
    folder: Path,
    dtype: StoredDtype = "float32",
    *,
    overwrite: bool = False,
    rows: tuple[int, int] | None = None,
    checkpoint_s: float = 5.0,
) -> np.ndarray:
    """Encode a corpus into `folder`, going on where an earlier run was broken off.

    Resident memory does not grow with the corpus.

    Args:
        overwrite: start again where the folder holds the vectors of something else.
        rows: only the rows from the first number to before the second, so that several machines can share a corpus,
            each in a folder of its own; see `join_vectors`.
        checkpoint_s: seconds of work that a killed run may lose, besides the chunk it was at.

    Returns:
        (len(corpus), D), or (rows, D), memory-mapped and read-only.

    Raises:
        ConfigError: the folder holds vectors of another corpus, encoder or dtype, or another process writes there.
        DataError: the folder is damaged, or cannot be written: what is finished by then is kept for the next run.
    """
    start, stop = rows or (0, len(corpus))
    if not 0 <= start < stop <= len(corpus):
        raise ConfigError(f"rows={start, stop}; expected a part of the corpus's {len(corpus)} documents")
    settings = spec_settings(encoder.spec)
    planned = VectorsInfo(
        corpus.fingerprint, len(corpus), start, stop, encoder.width, dtype, encoder.precision, settings
    )
    with _writing(folder):
        info = _found(folder, planned, overwrite)
        if info.rows:
            _check_first(folder, info, encoder, corpus)
        if not info.finished:
            info = _append(corpus, encoder, folder, info, checkpoint_s)
    if info.truncated:
        logger.warning("%d of %d passages were cut at %d tokens", info.truncated, stop - start, encoder.spec.max_length)
    return _map(folder, info)


def open_vectors(folder: Path, corpus: Corpus) -> np.ndarray:
    """Map the finished vectors of a corpus, (len(corpus), D), read-only.

    Raises:
        DataError: they are missing, unfinished, damaged, or those of another corpus.
    """
    info = VectorsInfo.load(folder)
    if info is None:
        raise DataError(f"{folder} holds no {INFO_NAME}; encode the corpus into it first")
    if (info.corpus, info.documents) != (corpus.fingerprint, len(corpus)):
        raise DataError(
            f"the vectors in {folder} are of another corpus: fingerprint {info.corpus[:12]} with {info.documents} "
            f"documents, but {corpus.path} has {corpus.fingerprint[:12]} with {len(corpus)}; pass that corpus"
        )
    if not info.finished or (info.start, info.stop) != (0, info.documents):
        raise DataError(
            f"the vectors in {folder} are of {info.rows} of {info.documents} documents; encode the rest of the corpus"
        )
    return _map(folder, info)


def join_vectors(parts: Sequence[Path], folder: Path, corpus: Corpus) -> np.ndarray:
    """Put together what `encode_corpus` made of parts of a corpus; `folder` is then as if it had made it at once.

    Raises:
        ConfigError: the parts are not of one encoder and dtype, or `folder` holds vectors already.
        DataError: a part is missing, unfinished or damaged, or the folder cannot be written.
    """
    infos = {part: VectorsInfo.load(part) for part in parts}
    found = {part: info for part, info in infos.items() if info is not None and info.finished}
    order = sorted(found, key=lambda part: found[part].start)
    bounds = [(found[part].start, found[part].stop) for part in order]
    if len(found) < len(parts) or [0, *(stop for _, stop in bounds)] != [*(start for start, _ in bounds), len(corpus)]:
        raise DataError(f"{len(parts)} parts hold finished rows {bounds}; expected all of 0 to {len(corpus)} once")
    total = replace(found[order[0]], start=0, stop=len(corpus), truncated=sum(i.truncated for i in found.values()))
    for part in order:
        wanted = replace(total, start=found[part].start, stop=found[part].stop, corpus=corpus.fingerprint)
        _refuse_other(part, found[part], wanted)
        _map(part, found[part])
    with _writing(folder):
        if (folder / INFO_NAME).exists() or (folder / VECTORS_NAME).exists():
            raise ConfigError(f"{folder} holds vectors already; pass another folder")
        temporary = folder / f"{VECTORS_NAME}.tmp"
        with temporary.open("wb") as joined:
            for part in order:
                with (part / VECTORS_NAME).open("rb") as file:
                    shutil.copyfileobj(file, joined, 1 << 24)
            joined.flush()
            os.fsync(joined.fileno())
        temporary.replace(folder / VECTORS_NAME)
        replace(total, rows=len(corpus)).save(folder)
    return open_vectors(folder, corpus)


def open_embeddings(path: Path, rows: int, width: int) -> np.ndarray:
    """Map published embeddings: raw float32 in corpus order, as `emb_{method}.memmap` holds them.

    Returns:
        (rows, width) float32, read-only.

    Raises:
        DataError: no such file, or one of another size.
    """
    if not path.is_file():
        raise DataError(f"embeddings {path}: no such file; pass a file of raw float32 numbers in corpus order")
    found, expected = path.stat().st_size, rows * width * 4
    if found != expected:
        raise DataError(
            f"embeddings {path} have {found} bytes, expected {expected} for {rows} documents of {width} float32 "
            "numbers; pass the file of this corpus and encoder, complete"
        )
    return np.memmap(path, dtype=np.float32, mode="r", shape=(rows, width))


def _found(folder: Path, planned: VectorsInfo, overwrite: bool) -> VectorsInfo:
    """Return what the folder holds of the planned vectors, with `vectors.json` written."""
    info = None if overwrite else VectorsInfo.load(folder)
    if info is not None:
        _refuse_other(folder, info, planned)
    elif (folder / VECTORS_NAME).exists() and not overwrite:
        raise ConfigError(f"{folder} holds a {VECTORS_NAME} without {INFO_NAME}; pass another folder, or overwrite it")
    else:
        info = planned
        info.save(folder)
    return info


def _refuse_other(folder: Path, found: VectorsInfo, planned: VectorsInfo) -> None:
    """Refuse vectors of something else. Where the model lies may differ: `_check_first` tells models apart."""
    ignored = {"rows", "truncated", "encoder"}
    there, asked = _identity(found), _identity(planned)
    names = [field.name for field in fields(VectorsInfo) if field.name not in ignored] + sorted(planned.encoder)
    differing = [name for name in names if there.get(name) != asked.get(name)]
    if differing:
        raise ConfigError(
            f"{folder} holds vectors of something else: "
            + ", ".join(f"{name} {there.get(name)!r}, asked for {asked.get(name)!r}" for name in differing)
            + "; pass another folder, or overwrite it"
        )


def _identity(info: VectorsInfo) -> dict[str, object]:
    settings = dict(info.encoder)
    for name in ("encoder_model", "encoder_passage_model", "encoder_package"):
        settings.pop(name, None)
    return {**asdict(info), **settings}


def _check_first(folder: Path, info: VectorsInfo, encoder: PassageEncoder, corpus: Corpus) -> None:
    """Encode the first document again: only the model that made the vectors finds its vector."""
    stored = _map(folder, info)[0].astype(np.float32)
    vector = encoder.encode_tokens(encoder.tokenize_passages([corpus[info.start].contents]))[0]
    distance = float(np.linalg.norm(stored - vector))
    if not distance <= _SAME_VECTOR * float(np.linalg.norm(vector)):
        raise ConfigError(
            f"{folder} holds vectors of another model: the first one is {distance:.3g} away from the encoder's; pass "
            "the model that they were begun with, or another folder, or overwrite it"
        )


def _append(
    corpus: Corpus, encoder: PassageEncoder, folder: Path, info: VectorsInfo, checkpoint_s: float
) -> VectorsInfo:
    """Encode the rows that are missing; returns what the folder then holds."""
    progress = tqdm(total=info.stop - info.start, initial=info.rows, desc="encoding", unit="doc")
    done = info
    try:
        with (
            progress,
            (folder / VECTORS_NAME).open("ab", buffering=0) as file,
            closing(_chunks(corpus, encoder, info.start + info.rows, info.stop)) as chunks,
        ):
            file.truncate(info.rows * info.row_bytes)  # what was written after the last checkpoint
            saved_at = time.monotonic()
            for vectors, truncated in chunks:
                _write(file.fileno(), vectors, done)
                done = replace(done, rows=done.rows + len(vectors), truncated=done.truncated + truncated)
                progress.update(len(vectors))
                if done.finished or time.monotonic() - saved_at >= checkpoint_s:
                    os.fsync(file.fileno())
                    done.save(folder)
                    info, saved_at = done, time.monotonic()
    except OSError as error:
        raise DataError(
            f"cannot write vectors into {folder} ({error}); the first {info.rows} of {info.stop - info.start} rows are "
            "kept: make room and run it again to go on"
        ) from error
    return done


def _chunks(corpus: Corpus, encoder: PassageEncoder, start: int, stop: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield vectors and how many of their passages were cut; the next chunk is read and tokenized meanwhile."""
    size = encoder.chunk_documents

    def tokens(first: int) -> Tokens:
        documents = corpus.documents(first, min(first + size, stop))
        return encoder.tokenize_passages([document.contents for document in documents])

    with ThreadPoolExecutor(max_workers=1) as ahead:
        waiting: Future[Tokens] = ahead.submit(tokens, start)
        for first in range(start, stop, size):
            current = waiting.result()
            if first + size < stop:
                waiting = ahead.submit(tokens, first + size)
            try:
                vectors = encoder.encode_tokens(current)
            except RetrieverError as error:
                raise DataError(f"rows {first} to {first + len(current.ids)} of the corpus: {error}") from error
            yield vectors, current.truncated


def _write(file: int, vectors: np.ndarray, info: VectorsInfo) -> None:
    with np.errstate(over="ignore"):  # it is looked for in the next line
        stored = vectors.astype(info.dtype, copy=False)
    if not np.isfinite(stored).all():
        raise DataError(
            f"a vector of rows {info.start + info.rows} to {info.start + info.rows + len(vectors)} does not fit into "
            f"{info.dtype}; use float32"
        )
    waiting = memoryview(np.ascontiguousarray(stored)).cast("B")
    while waiting:
        waiting = waiting[os.write(file, waiting) :]


def _map(folder: Path, info: VectorsInfo) -> np.ndarray:
    """Map the rows that are finished."""
    path = folder / VECTORS_NAME
    size = path.stat().st_size if path.is_file() else 0
    if size < info.rows * info.row_bytes or (info.finished and size != info.rows * info.row_bytes):
        raise DataError(
            f"{path} has {size} bytes, but {INFO_NAME} counts {info.rows} rows of {info.row_bytes} bytes; the file is "
            "damaged: encode the corpus again"
        )
    return np.memmap(path, dtype=info.dtype, mode="r", shape=(info.rows, info.width))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes from writing there; a killed process leaves no lock behind."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK_NAME).open("w") as lock:
            _lock(lock.fileno(), folder)
            yield
    except OSError as error:
        raise DataError(f"cannot write vectors into {folder} ({error}); make room, or pass another folder") from error


def _lock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"another process writes vectors into {folder}; wait for it, or pass another") from error


def _sync_folder(folder: Path) -> None:
    """Bring a renaming to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
