"""Large files out of what was downloaded: parts appended to one another, gzips unpacked."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from verl.errors import DataError

_CHUNK = 16 << 20


def unfinished_path(target: Path) -> Path:
    """Return the name that a file bears until it is complete."""
    return target.with_name(f"{target.name}.unfinished")


def join(parts: Sequence[Path], target: Path) -> None:
    """Append `parts` to one another; `target` appears only when complete.

    What a run that was killed has written is compared with the parts, and kept as far as it agrees.

    Raises:
        DataError: the parts changed meanwhile.
    """
    unfinished = unfinished_path(target)
    unfinished.touch()
    size = sum(part.stat().st_size for part in parts)
    name = f"joining {target.name}"
    with unfinished.open("r+b") as out, tqdm(total=size, desc=name, unit="B", unit_scale=True, delay=2) as progress:
        agrees = True
        for chunk in (chunk for part in parts for chunk in _chunks(part)):
            at = out.tell()
            if not agrees or out.read(len(chunk)) != chunk:
                agrees = False
                out.seek(at)
                out.write(chunk)
            progress.update(len(chunk))
        out.truncate()
        out.flush()
        os.fsync(out.fileno())
        written = out.tell()
    if written != size:
        raise DataError(f"{unfinished} has {written} bytes, its parts have {size}; run again")
    os.replace(unfinished, target)


def unzip(source: Path, target: Path) -> None:
    """Unpack a gzip; `target` appears only when all of it is there and the checksum in the gzip agrees.

    Raises:
        DataError: the gzip is broken.
    """
    unfinished = unfinished_path(target)
    size = source.stat().st_size
    name = f"unzipping {source.name}"
    try:
        with (
            source.open("rb") as raw,
            gzip.GzipFile(fileobj=raw) as stream,
            unfinished.open("wb") as out,
            tqdm(total=size, desc=name, unit="B", unit_scale=True, delay=2) as progress,
        ):
            while chunk := stream.read(_CHUNK):
                out.write(chunk)
                progress.update(raw.tell() - progress.n)
            out.flush()
            os.fsync(out.fileno())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        unfinished.unlink()
        raise DataError(f"{source}: broken gzip ({error}); delete it and run again") from error
    os.replace(unfinished, target)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
