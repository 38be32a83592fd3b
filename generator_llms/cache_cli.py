"""Look into a reply cache, carry it to another machine, and cut it down.

    python -m generator_llms.cache_cli stats --path replies.sqlite
    python -m generator_llms.cache_cli export --path replies.sqlite --output replies.jsonl
    python -m generator_llms.cache_cli import --path other.sqlite --input replies.jsonl
    python -m generator_llms.cache_cli prune --path replies.sqlite --unused-days 90

All of them may run while generators use the file; only `prune --compact` makes those wait.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from generator_llms.cache import Entry, ReplyCache
from generator_llms.cache_schema import SCHEMA_VERSION
from generator_llms.replies import Completion, ServedModel, shorten
from verl.errors import ConfigError, DataError, SearchAgentError

_HEADER = {"generator_replies": SCHEMA_VERSION}
_KEY = re.compile(r"[0-9a-f]{64}")
_AT_ONCE = 500
_DAY_S = 86_400.0


@dataclass(slots=True)
class ModelStats:
    """What a cache holds of one model; `size` is the bytes of the replies as text, times are seconds since 1970."""

    replies: int = 0
    size: int = 0
    first: float = math.inf
    last_used: float = 0.0


@dataclass(frozen=True, slots=True)
class Served:
    """A line of an export: what an endpoint served."""

    endpoint: str
    model: ServedModel


def stats_by_model(cache: ReplyCache) -> dict[str, ModelStats]:
    """Return the figures of every model in `cache`, by its name."""
    found: dict[str, ModelStats] = {}
    for entry in cache.entries():
        stats = found.setdefault(entry.model, ModelStats())
        stats.replies += 1
        stats.size += len(entry.reply.encode("utf-8", errors="replace"))
        stats.first = min(stats.first, entry.created)
        stats.last_used = max(stats.last_used, entry.used)
    return dict(sorted(found.items()))


def export_to(cache: ReplyCache, output: Path) -> int:
    """Write every reply to `output`, a line of JSON each, under a line that names the schema.

    The file appears when it is complete.

    Returns:
        The number of replies.
    """
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    count = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(_HEADER) + "\n")
            for endpoint, model in cache.all_served().items():
                file.write(json.dumps({"endpoint": endpoint, **asdict(model)}) + "\n")
            for entry in cache.entries():
                file.write(json.dumps({**asdict(entry), "reply": json.loads(entry.reply)}) + "\n")
                count += 1
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return count


def import_from(cache: ReplyCache, source: Path) -> tuple[int, int]:
    """Add the replies of an export; those that are there stay as they are.

    The whole file is checked before the first reply is stored.

    Returns:
        How many replies the file holds, and how many of them were new.

    Raises:
        DataError: a line is malformed, or the file is of another schema.
    """
    for _ in _read(source):
        pass
    total = new = 0
    lines = _read(source)
    while batch := list(islice(lines, _AT_ONCE)):
        for line in batch:
            if isinstance(line, Served) and cache.served(line.endpoint) is None:
                cache.put_served(line.endpoint, line.model)
        entries = [line for line in batch if isinstance(line, Entry)]
        total += len(entries)
        new += cache.put_all(entries)
    return total, new


def _read(source: Path) -> Iterator[Entry | Served]:
    with source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                payload = json.loads(line)
                if number == 1:
                    _check_header(payload, source)
                else:
                    yield _entry(payload)
            except (ValueError, TypeError, KeyError, RecursionError) as cause:
                raise DataError(
                    f"{source}:{number}: {cause!r} in {shorten(repr(line))}; expected a line of `export`"
                ) from cause
    if os.path.getsize(source) == 0:
        raise DataError(f"{source} is empty; expected the output of `export`")


def _check_header(payload: Any, source: Path) -> None:
    if payload != _HEADER:
        raise DataError(
            f"{source} starts with {shorten(repr(payload))}, expected {json.dumps(_HEADER)}; export it again with this "
            "version"
        )


def _entry(payload: dict[str, Any]) -> Entry | Served:
    """Return what a line holds.

    Raises:
        ValueError, TypeError, KeyError: it is malformed.
    """
    if "endpoint" in payload:
        endpoint, name, length = payload["endpoint"], payload["name"], payload["max_model_len"]
        if not (isinstance(endpoint, str) and isinstance(name, str) and isinstance(length, int | None)):
            raise ValueError("a served model needs endpoint, name and max_model_len")
        return Served(endpoint, ServedModel(name, length))
    key, model, times = payload["key"], payload["model"], (payload["created"], payload["used"])
    if not (isinstance(key, str) and _KEY.fullmatch(key) and isinstance(model, str)):
        raise ValueError("a reply needs a key of 64 hexadecimal digits and a model")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in times):
        raise ValueError("created and used are seconds since 1970")
    reply = json.dumps(payload["reply"])
    Completion.from_json(reply)
    return Entry(key, model, reply, *times)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns an exit code, 2 after a wrong argument or file."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments.path.is_file() and arguments.command != "import":
            raise ConfigError(f"--path {arguments.path}: no such file; name the cache_path of a run")
        sys.stdout.write(_COMMANDS[arguments.command](arguments) + "\n")
    except (SearchAgentError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _readable(path: Path) -> ReplyCache:
    try:
        return ReplyCache(path)  # which brings an old file up to date
    except ConfigError:
        return ReplyCache(path, read_only=True)


def _stats(arguments: argparse.Namespace) -> str:
    cache = _readable(arguments.path)
    try:
        found, size = stats_by_model(cache), cache.size()
    finally:
        cache.close()
    head = f"{'model':<40}{'replies':>10}{'MB':>10}  {'first':<18}{'last used':<18}"
    rows = [
        f"{name:<40}{stats.replies:>10}{stats.size / 1e6:>10.1f}  {_day(stats.first):<18}{_day(stats.last_used):<18}"
        for name, stats in found.items()
    ]
    total = f"{sum(stats.replies for stats in found.values())} replies, {size / 1e6:.1f} MB with their index"
    return "\n".join([head, *rows, total])


def _export(arguments: argparse.Namespace) -> str:
    cache = _readable(arguments.path)
    try:
        return f"wrote {export_to(cache, arguments.output)} replies to {arguments.output}"
    finally:
        cache.close()


def _import(arguments: argparse.Namespace) -> str:
    if not arguments.input.is_file():
        raise ConfigError(f"--input {arguments.input}: no such file; name the output of `export`")
    cache = ReplyCache(arguments.path)
    try:
        total, new = import_from(cache, arguments.input)
    finally:
        cache.close()
    return f"{arguments.input} holds {total} replies, {new} of them new to {arguments.path}"


def _prune(arguments: argparse.Namespace) -> str:
    if arguments.model is None and arguments.unused_days is None and arguments.max_bytes is None:
        raise ConfigError("prune needs --model, --unused-days or --max-bytes; it removes nothing by itself")
    cache = ReplyCache(arguments.path)
    try:
        removed = 0
        if arguments.model is not None or arguments.unused_days is not None:
            days = arguments.unused_days
            removed += cache.prune(arguments.model, None if days is None else time.time() - days * _DAY_S)
        if arguments.max_bytes is not None:
            removed += cache.prune_to(arguments.max_bytes)
        if arguments.compact:
            cache.compact()
        return f"removed {removed} replies, {cache.count()} are left in {cache.size() / 1e6:.1f} MB"
    finally:
        cache.close()


_COMMANDS = {"stats": _stats, "export": _export, "import": _import, "prune": _prune}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="s3 cache", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    stats = commands.add_parser("stats", help="what the cache holds, by model")
    export = commands.add_parser("export", help="write all replies to a file of JSON lines")
    export.add_argument("--output", type=Path, required=True)
    load = commands.add_parser("import", help="add the replies of an exported file")
    load.add_argument("--input", type=Path, required=True)
    prune = commands.add_parser("prune", help="remove replies; --model and --unused-days together mean both")
    prune.add_argument("--model", help="those of this model")
    prune.add_argument("--unused-days", type=float, help="those not used for so many days")
    prune.add_argument("--max-bytes", type=int, help="those not used for longest, until the rest is smaller")
    prune.add_argument("--compact", action="store_true", help="then shrink the file; generators wait meanwhile")
    for command in (stats, export, load, prune):
        command.add_argument("--path", type=Path, required=True, help="the sqlite file, cache_path of a run")
    return parser


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


if __name__ == "__main__":
    sys.exit(main())
