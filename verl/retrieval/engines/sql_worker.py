"""The process in which a policy's SQL runs: started by path, of the standard library alone, and fit to be killed.

One request is a frame (4 bytes of length, then JSON) `{"database": PATH, "sql": TEXT}` on standard input; one reply is
a frame `{"rows": [...], "columns": N}` or `{"error": KIND, "message": TEXT}` on standard output. A blob travels as
`{"x": HEX}`. The process ends when its input does, so it never outlives its parent for longer than one statement.

What keeps a statement from doing harm, each layer by itself:

- the connection is read-only, and immutable where no journal stands beside the database;
- an authorizer admits selecting, reading and the functions named here: no write, ATTACH, PRAGMA, transaction or
  temporary object, and no virtual table of SQLite's own but `json_each` and `json_tree`;
- SQLite's limits bound the statement, its values, patterns, nesting and program; a progress handler bounds its time;
- SQLite's heap and the address space are bounded, no file may grow, no core is dumped, no process can be started, and
  a statement that hangs where no handler is called runs out of processor time, if its parent has not killed it before.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sqlite3
import struct
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import quote

HEADER = struct.Struct(">I")
MIB = 1 << 20
_CELL_BYTES = 16
_ROWS_AT_ONCE = 256
_STEPS_BETWEEN_LOOKS = 20_000
_ADDRESS_SPACE_BESIDES = 768 * MIB
"""For Python: its cells are several times as large as what they hold."""

_PURE = """
abs char coalesce concat concat_ws format glob hex ifnull if iif instr length like likelihood likely lower ltrim
max min nullif octet_length printf quote random randomblob replace round rtrim sign soundex substr substring trim
typeof unhex unicode unlikely upper zeroblob
avg count group_concat median percentile percentile_cont percentile_disc string_agg sum total
cume_dist dense_rank first_value lag last_value lead nth_value ntile percent_rank rank row_number
current_date current_time current_timestamp date datetime julianday strftime time timediff unixepoch
acos acosh asin asinh atan atan2 atanh ceil ceiling cos cosh degrees exp floor ln log log10 log2 mod pi pow power
radians sin sinh sqrt tan tanh trunc
-> ->> json json_array json_array_length json_error_position json_extract json_group_array json_group_object
json_insert json_object json_patch json_pretty json_quote json_remove json_replace json_set json_type json_valid
"""
FUNCTIONS = frozenset(_PURE.split())
"""Functions that only compute. Not among them: load_extension, fts3_tokenizer, and all that tells about the process."""
_ADMITTED_MODULES = ("json_each", "json_tree")

_SYNTAX = ("syntax error", "unrecognized token", "incomplete input", "parser stack overflow", "null character")
_REFUSED = ("not authorized", "prohibited", "readonly database", "no such module", "too many attached")
_TOO_LARGE = ("too big", "too large", "too long")


@dataclass(frozen=True)
class Limits:
    """What one statement may take.

    Attributes:
        timeout_s: seconds.
        max_rows: of a result.
        max_bytes: of a result, and of any one value.
        memory_bytes: of SQLite's heap.
        max_chars: of the statement.
    """

    timeout_s: float
    max_rows: int
    max_bytes: int
    memory_bytes: int
    max_chars: int


class Refusal(Exception):
    """A statement without a result: its kind, and why in words."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def answer(database: str, sql: str, limits: Limits) -> dict[str, Any]:
    """Run one statement; whatever comes of it is a reply."""
    deadline = time.monotonic() + limits.timeout_s
    try:
        connection = _connect(database, limits, deadline)
        try:
            return _rows(connection, sql, limits, deadline)
        finally:
            connection.close()
    except Refusal as refusal:
        return {"error": refusal.kind, "message": str(refusal)}
    except MemoryError:
        return {"error": "memory", "message": f"it took more than {limits.memory_bytes // MIB} MiB"}
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        return {"error": kind_of(error), "message": str(error)[:500]}


def kind_of(error: Exception) -> str:
    """Say which kind an error of sqlite3 is."""
    name, message = getattr(error, "sqlite_errorname", "") or "", str(error).lower()
    if name == "SQLITE_INTERRUPT":
        return "timeout"
    if name.startswith(("SQLITE_AUTH", "SQLITE_READONLY", "SQLITE_PERM")) or any(part in message for part in _REFUSED):
        return "refused"
    if name == "SQLITE_TOOBIG" or any(part in message for part in _TOO_LARGE):
        return "too_large"
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_CANTOPEN", "SQLITE_IOERR", "SQLITE_BUSY")):
        return "unreadable_database"
    if "one statement at a time" in message:
        return "several_statements"
    if isinstance(error, ValueError) or any(part in message for part in _SYNTAX):
        return "syntax"  # a ValueError: a NUL, or what is no Unicode
    return "invalid"


def _connect(database: str, limits: Limits, deadline: float) -> sqlite3.Connection:
    """Open a database so that nothing can be done to it; Refusal if it is not there."""
    if not os.path.isfile(database):
        raise Refusal("missing_database", f"{os.path.basename(database)} is not there")
    # Immutable takes no lock and makes no file, but overlooks what a journal holds.
    beside = (f"{database}{end}" for end in ("-wal", "-journal"))
    frozen = not any(os.path.exists(path) and os.path.getsize(path) for path in beside)
    uri = f"file:{quote(database)}?mode=ro{'&immutable=1' if frozen else ''}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=limits.timeout_s, cached_statements=0)
    connection.text_factory = _text
    for setting in ("trusted_schema=OFF", "query_only=ON", "temp_store=MEMORY", "mmap_size=0", "cell_size_check=ON"):
        connection.execute(f"PRAGMA {setting}")
    connection.execute(f"PRAGMA hard_heap_limit={limits.memory_bytes}")
    # They are declared when first used, which the authorizer would take for a write.
    connection.execute("SELECT 1 FROM json_each('[]'), json_tree('[]')").fetchall()
    modules = {row[0].lower() for row in connection.execute("SELECT name FROM pragma_module_list")}
    _set_limits(connection, limits)
    connection.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS_BETWEEN_LOOKS)
    connection.set_authorizer(_authorizer(modules.difference(_ADMITTED_MODULES)))
    return connection


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")  # what is no UTF-8 stays what it is, and stays distinct


def _set_limits(connection: sqlite3.Connection, limits: Limits) -> None:
    bounds = {
        sqlite3.SQLITE_LIMIT_LENGTH: limits.max_bytes,
        sqlite3.SQLITE_LIMIT_SQL_LENGTH: 4 * limits.max_chars,
        sqlite3.SQLITE_LIMIT_COLUMN: 2_000,
        sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 1_000,
        sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 200,
        sqlite3.SQLITE_LIMIT_VDBE_OP: 10_000_000,
        sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 100,
        sqlite3.SQLITE_LIMIT_ATTACHED: 0,
        sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 5_000,
        sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
        sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 0,
        sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
    }
    for what, bound in bounds.items():
        connection.setlimit(what, bound)


def _authorizer(modules: set[str]) -> Callable[..., int]:
    """Return the function that admits what only reads.

    Args:
        modules: virtual tables that tell about the database file or the process.
    """
    harmless = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE}

    def admits(action: int, first: str | None, second: str | None, *_: str | None) -> bool:
        if action in harmless:
            return True
        if action == sqlite3.SQLITE_READ:
            table = (first or "").lower()
            return table not in modules and not table.startswith("pragma_")
        return action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS

    return lambda *call: sqlite3.SQLITE_OK if admits(*call) else sqlite3.SQLITE_DENY


def _rows(connection: sqlite3.Connection, sql: str, limits: Limits, deadline: float) -> dict[str, Any]:
    """Return the rows of a statement; Refusal where a limit is met."""
    if len(sql) > limits.max_chars:
        raise Refusal("too_large", f"the statement has {len(sql)} characters; expected at most {limits.max_chars}")
    cursor = connection.execute(sql)
    if cursor.description is None:
        raise Refusal("no_statement", "there is no statement, or none that returns rows")
    rows: list[list[Any]] = []
    size = 0
    while chunk := cursor.fetchmany(_ROWS_AT_ONCE):
        for row in chunk:
            rows.append([_cell(value) for value in row])
            size += sum(_size(value) for value in row)
            if size > limits.max_bytes:
                raise Refusal("too_large", f"the result has more than {limits.max_bytes // MIB} MiB")
            if len(rows) > limits.max_rows:
                raise Refusal("too_many_rows", f"the result has more than {limits.max_rows} rows")
        if time.monotonic() > deadline:
            raise Refusal("timeout", "interrupted")
    return {"rows": rows, "columns": len(cursor.description)}


def _cell(value: Any) -> Any:
    return {"x": value.hex()} if isinstance(value, bytes) else value


def _size(value: Any) -> int:
    return _CELL_BYTES + (len(value) if isinstance(value, str | bytes) else 0)


def read_frame(stream: BinaryIO) -> bytes | None:
    """Return the next frame, None where the stream ends."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (length,) = HEADER.unpack(header)
    body = stream.read(length)
    return body if len(body) == length else None


def encoded(value: Mapping[str, Any]) -> bytes:
    """Return a value as a frame."""
    body = json.dumps(value, separators=(",", ":")).encode("ascii")
    return HEADER.pack(len(body)) + body


def restrict(limits: Limits) -> None:
    """Take from this process what it does not need."""
    lowered = {
        resource.RLIMIT_AS: limits.memory_bytes + 4 * limits.max_bytes + _ADDRESS_SPACE_BESIDES,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 32,
    }
    for what, bound in lowered.items():
        _, hard = resource.getrlimit(what)
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(what, (bound, bound))


def allow_seconds(seconds: float) -> None:
    """Have the system end this process after so many more seconds of processor time, wherever it hangs."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def main(arguments: list[str]) -> None:
    """Serve requests until the input ends; the one argument is `Limits` as JSON."""
    limits = Limits(**json.loads(arguments[0]))
    restrict(limits)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    while (frame := read_frame(requests)) is not None:
        request = json.loads(frame)
        allow_seconds(2 * limits.timeout_s)
        try:
            reply = encoded(answer(request["database"], request["sql"], limits))
        except MemoryError:
            reply = encoded({"error": "memory", "message": "the result does not fit into memory"})
        replies.write(reply)
        replies.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
