"""Published warm-up files, checked and mended: a JSON array (or jsonl) of `{messages: [{role, content}]}`.

    python -m data_preprocess.warmup_file --input hotpot-traj.all.11771.json --output data/warmup.jsonl

What the released conversion left in its files is mended, counted and said, never passed over: a misspelt `content:`
key; a literal `{question}` where the conversation itself says the question; choices of documents counted from 0 while
the documents are numbered from 1. What cannot be mended (no messages, speakers that do not alternate, an empty turn of
the assistant, a placeholder whose question is nowhere) is left out with its reason.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_preprocess.readers.files import read_file
from verl.agent.grammar.base import Message
from verl.errors import DataError, SearchAgentError
from verl.evaluation.journal import write_whole

logger = logging.getLogger(__name__)

PLACEHOLDER = "{question}"
_ASKED = re.compile(r"<USER QUERY>\s*(.+?)\s*(?:\n\s*Your Output:|\Z)", re.DOTALL)
_CHOICE = re.compile(r"\s*\[\d{1,6}\](?:\s*>\s*\[\d{1,6}\])*\s*")
_NUMBER = re.compile(r"\d+")
_LISTED = re.compile(r"^\s*\[(\d{1,6})\]", re.MULTILINE)


@dataclass
class Report:
    """What became of the rows: `mended` counts repairs, `rejected` rows that are left out, both by kind."""

    rows: int = 0
    kept: int = 0
    mended: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)


def normalise(rows: Iterable[Any], zero_based: bool | None = None) -> tuple[list[dict[str, Any]], Report]:
    """Mend the rows of a published warm-up file.

    Args:
        zero_based: whether choices of documents count from 0; None finds out: they do if any of them names a 0, which
            no document has.

    Returns:
        The rows that can be trained on, with what else they say (`prob`, `query_id`) as it was, and the report.
    """
    rows = list(rows)
    report = Report(rows=len(rows))
    conversations = [_messages(row, report) for row in rows]
    if zero_based is None:
        choices = (chat[1]["content"] for chat in conversations if not isinstance(chat, str) and _is_rank(chat))
        zero_based = any("0" in _NUMBER.findall(choice) for choice in choices)
    kept = []
    for row, chat in zip(rows, conversations, strict=True):
        mended = chat if isinstance(chat, str) else _mended(chat, zero_based, report)
        if isinstance(mended, str):
            report.rejected[mended] += 1
        else:
            kept.append({**row, "messages": mended})
    report.kept = len(kept)
    return kept, report


def _messages(row: Any, report: Report) -> list[Message] | str:
    """Return a row's messages with their keys mended, or why they are none."""
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return "no messages"
    read: list[Message] = []
    for message in messages:
        if not isinstance(message, Mapping):
            return "a message that is no object"
        if "content" not in message and "content:" in message:
            report.mended["key content:"] += 1
            message = {"role": message.get("role"), "content": message["content:"]}
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            return "a message without role or content"
        read.append({"role": role, "content": content})
    return read


def _mended(chat: list[Message], zero_based: bool, report: Report) -> list[Message] | str:
    spoken = [message for message in chat if message["role"] != "system"]
    if len(spoken) < 2 or any(m["role"] != ("user", "assistant")[n % 2] for n, m in enumerate(spoken)):
        return "user and assistant do not alternate"
    if chat[-1]["role"] != "assistant":
        return "the last turn is not the assistant's"
    if any(message["role"] == "assistant" and not message["content"].strip() for message in chat):
        return "an empty turn of the assistant"
    if any(PLACEHOLDER in message["content"] for message in chat):
        asked = _ASKED.search(spoken[0]["content"])
        if asked is None or PLACEHOLDER in asked[1]:
            return "a literal {question}, and no question to put there"
        report.mended["literal {question}"] += 1
        chat = [{**m, "content": m["content"].replace(PLACEHOLDER, asked[1])} for m in chat]
    return _counted_from_one(chat, report) if zero_based and _is_rank(chat) else chat


def _is_rank(chat: Sequence[Message]) -> bool:
    """Whether a conversation is a choice of documents: one turn, answered by numbers in brackets."""
    return len(chat) == 2 and _CHOICE.fullmatch(chat[1]["content"]) is not None


def _counted_from_one(chat: Sequence[Message], report: Report) -> list[Message] | str:
    choice = _NUMBER.sub(lambda number: str(int(number[0]) + 1), chat[1]["content"])
    listed = [int(number) for number in _LISTED.findall(chat[0]["content"])]
    if listed and not set(map(int, _NUMBER.findall(choice))) <= set(listed):
        return "a choice of a document that is not listed"
    report.mended["choice counted from 0"] += 1
    return [chat[0], {"role": "assistant", "content": choice}]


def convert(source: Path, output: Path) -> Report:
    """Mend a file into a jsonl that `verl.trainer.main_sft` reads.

    Raises:
        DataError: the file cannot be read, or nothing is left of it.
    """
    rows, report = normalise(located.row for located in read_file(source))
    if not rows:
        raise DataError(f"{source}: none of its {report.rows} rows is left ({dict(report.rejected)})")
    write_whole(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Check and mend a published warm-up file.")
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        report = convert(options.input, options.output)
    except SearchAgentError as cause:
        parser.exit(1, f"error: {cause}\n")
    lines = [f"{report.kept} of {report.rows} rows kept in {options.output}"]
    lines += [f"mended: {kind}: {count}" for kind, count in sorted(report.mended.items())]
    lines += [f"left out: {kind}: {count}" for kind, count in sorted(report.rejected.items())]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
