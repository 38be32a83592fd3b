"""The files between the stages: the published layouts, and beside them what they leave out.

Of an iteration e, in `{output}/epo{e}`:

| file | layout | content |
|---|---|---|
| `{questions}.{model}.inference.{l}.{r}.json` | published | `{score, output, config}` |
| `trajectories.jsonl` | ours | every trajectory with its tokens and provenance (`verl.trajectories`) |
| `epo_{e}.entropy.left={l}.right={r}.json` | published | `[{log_probs, query_id}]`, log_probs the mean NLL |
| `epo{e}.training.len={n}.json` | published | `[{messages, prob}]`, exp(-prob) is the weight |
| `epo{e}.rows.jsonl` | ours | `{input_ids, loss_mask, weight}`: the tokens as they were sampled |

`output` is a list of `{query_id, answer, pred, messages, rank}`.

Rows of the published layouts carry `trajectory`, the number of a question's trajectory, so that files are matched by
(`query_id`, `trajectory`) and never by position; and each file says by fingerprints which questions and which tokenizer
it belongs to (`config`, or a `.config.json` beside it where the layout is a bare list).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.errors import DataError
from verl.evaluation.journal import fingerprint, question_key, write_whole
from verl.trajectories import append_trajectories, iter_trajectories
from verl.types import Question, RewardOutcome, Trajectory

Key = tuple[str, int]
"""A question's id and the number of its trajectory."""
_NUMBER = "trajectory"


@dataclass(frozen=True, slots=True)
class EpochFiles:
    """The files of one iteration over the questions [left:right) of its order."""

    folder: Path
    epoch: int
    questions: str
    parent: str
    left: int
    right: int

    @property
    def journal(self) -> Path:
        """What an E-step that is cut off goes on from."""
        return self.folder / "journal.jsonl"

    @property
    def trajectories(self) -> Path:
        """Every trajectory with its tokens."""
        return self.folder / "trajectories.jsonl"

    @property
    def inference(self) -> Path:
        """The published inference file."""
        return self.folder / f"{self.questions}.{self.parent}.inference.{self.left}.{self.right}.json"

    @property
    def entropy(self) -> Path:
        """The published entropy file."""
        return self.folder / f"epo_{self.epoch}.entropy.left={self.left}.right={self.right}.json"

    @property
    def rows(self) -> Path:
        """Token rows of the M-step."""
        return self.folder / f"epo{self.epoch}.rows.jsonl"

    def training(self, count: int) -> Path:
        """The published training file of `count` examples."""
        return self.folder / f"epo{self.epoch}.training.len={count}.json"

    @property
    def align(self) -> Path:
        """The M-step's run."""
        return self.folder / "align"


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a file's content belongs to.

    Attributes:
        questions: fingerprint of the questions, in order.
        tokenizer: fingerprint of vocabulary and chat template.
        model: identity of the policy.
    """

    questions: str
    tokenizer: str
    model: str

    def check(self, found: Mapping[str, Any], path: Path, names: Sequence[str] = ("questions", "tokenizer")) -> None:
        """Refuse a file that belongs to something else.

        Raises:
            DataError: says which, and what to do.
        """
        for name in names:
            wanted = getattr(self, name)
            if found.get(name) != wanted:
                what = {"questions": "another question set", "tokenizer": "another tokenizer", "model": "another model"}
                raise DataError(
                    f"{path} belongs to {what[name]} ({name} {found.get(name)!r}, expected {wanted!r}); run its stage "
                    "again for these, or pass the file's own"
                )


def tokenizer_identity(tokenizer: Any) -> str:
    """Return a digest of all that turns text into tokens here: vocabulary and chat template."""
    return fingerprint([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])


def questions_identity(questions: Iterable[Question]) -> str:
    """Return a digest of questions and their order."""
    return fingerprint([question_key(question) for question in questions])


def gold_of(question: Question) -> str | list[str]:
    """Return the accepted answers as the published files hold them: a string if there is one, else a list."""
    return question.answers[0] if len(question.answers) == 1 else list(question.answers)


def write_trajectories(path: Path, items: Iterable[tuple[int, Trajectory, RewardOutcome]]) -> int:
    """Write numbered trajectories with their tokens, whole or not at all; return how many."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    numbered = (
        (
            trajectory,
            RewardOutcome(
                outcome.score, {**outcome.parts, _NUMBER: number}, outcome.answer, outcome.correct, outcome.failed
            ),
        )
        for number, trajectory, outcome in items
    )
    count = append_trajectories(partial, numbered, with_ids=True)
    partial.replace(path)
    return count


def read_trajectories(path: Path) -> Iterator[tuple[Key, Trajectory, RewardOutcome]]:
    """Stream what `write_trajectories` wrote.

    Raises:
        DataError: no such file, a malformed line, or a trajectory without a number.
    """
    for trajectory, outcome in iter_trajectories(path):
        if outcome is None or _NUMBER not in outcome.parts:
            raise DataError(f"{path}: a trajectory of {trajectory.question.id!r} has no number; run `inference` again")
        yield (trajectory.question.id, int(outcome.parts[_NUMBER])), trajectory, outcome


def write_json(path: Path, value: Any, config: Mapping[str, Any] | None = None) -> Path:
    """Write a published file, and what it belongs to beside it where its layout has no place for that."""
    if config is not None:
        write_whole(_config_of(path), json.dumps(config, indent=1) + "\n")
    write_whole(path, json.dumps(value, ensure_ascii=False, allow_nan=False))
    return path


def read_json(path: Path) -> Any:
    """Read a published file.

    Raises:
        DataError: there is none, or it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        raise DataError(f"{path} does not exist; run the stage that writes it first") from cause
    except ValueError as cause:
        raise DataError(f"{path} is no JSON ({cause}); run the stage that writes it again") from cause


def read_config(path: Path) -> Mapping[str, Any]:
    """Return what a file belongs to: its own `config`, or that of the file beside it; empty where nothing says."""
    beside = _config_of(path)
    return read_json(beside) if beside.is_file() else {}


def by_key(rows: Any, path: Path, names: Sequence[str]) -> dict[Key, Mapping[str, Any]]:
    """Return the rows of a published list by question and trajectory; rows without a number are a question's only one.

    Raises:
        DataError: no list of objects, a row without one of `names` or `query_id`, or two rows of one trajectory.
    """
    if not isinstance(rows, list):
        raise DataError(f"{path}: {type(rows).__name__}; expected a list of objects")
    found: dict[Key, Mapping[str, Any]] = {}
    for number, row in enumerate(rows):
        missing = [name for name in ("query_id", *names) if not isinstance(row, Mapping) or name not in row]
        if missing:
            raise DataError(f"{path}: row {number} lacks {', '.join(missing)}; expected query_id, {', '.join(names)}")
        key = (str(row["query_id"]), int(row.get(_NUMBER, 0)))
        if key in found:
            raise DataError(f"{path}: question {key[0]!r} has trajectory {key[1]} twice; expected each once")
        found[key] = row
    return found


def _config_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.config.json")
