"""Named stages of a long run: timed, and reused by the next run as long as their inputs stay the same."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl.errors import DataError
from verl.evaluation.journal import fingerprint, write_whole
from verl.typed import Decoder

logger = logging.getLogger(__name__)
_DECODER = Decoder(error=DataError)


@dataclass(frozen=True, slots=True)
class Done:
    """A finished stage.

    Attributes:
        fingerprint: of its inputs; put it among the inputs of the stages that build on this one.
        seconds: wall-clock of the run that did the work, services not counted.
        value: what the stage returned; JSON.
        reused: an earlier run had done the work.
    """

    name: str
    fingerprint: str
    seconds: float
    value: Any
    reused: bool = False


class Stages:
    """Runs the stages of one output folder, and remembers each in `{folder}/stages/{name}.json`.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.perf_counter) -> None:
        self.done: list[Done] = []
        self._folder = folder
        self._clock = clock
        self._aside = 0.0

    def run(self, name: str, inputs: Any, outputs: Sequence[Path], body: Callable[[], Any]) -> Done:
        """Run `body` unless it has been done for these inputs and its outputs are there.

        When the inputs are others than last time, the outputs are deleted first. When they are the same and the last
        run did not finish, the outputs are kept, so that a body which can resume does.

        Args:
            inputs: everything that the outcome depends on, as `verl.typed.encode` takes it.
            outputs: files and folders below the output folder that belong to this stage.
            body: returns what the stage found out, as JSON.

        Raises:
            DataError: the stage's memory is malformed.
        """
        stamp, wanted = self._folder / "stages" / f"{name}.json", fingerprint(inputs)
        earlier = _read(stamp)
        if earlier is not None and earlier.fingerprint == wanted:
            if earlier.seconds >= 0 and all(path.exists() for path in outputs):
                logger.info("%s: reused, it took %.1f s", name, earlier.seconds)
                return self._finished(Done(name, wanted, earlier.seconds, earlier.value, reused=True))
        else:
            for path in outputs:
                self._delete(path)
        _write(stamp, _Stamp(wanted))
        logger.info("%s: started", name)
        self._aside, started = 0.0, self._clock()
        value = body()
        seconds = round(self._clock() - started - self._aside, 3)
        # Read back, so that a value is the same whether or not the stage is reused.
        _write(stamp, _Stamp(wanted, seconds, value))
        logger.info("%s: %.1f s", name, seconds)
        return self._finished(Done(name, wanted, seconds, json.loads(json.dumps(value))))

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Time work that a stage is the first to need but that serves all; it counts as a stage of its own."""
        started = self._clock()
        yield
        seconds = self._clock() - started
        self._aside += seconds
        self._finished(Done(name, "", round(seconds, 3), None))
        logger.info("%s: %.1f s", name, seconds)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall-clock by stage, in the order in which they finished."""
        return {done.name: done.seconds for done in self.done}

    def _finished(self, done: Done) -> Done:
        self.done.append(done)
        return done

    def _delete(self, path: Path) -> None:
        if not path.resolve().is_relative_to(self._folder.resolve()):
            raise ValueError(f"output {path} is outside {self._folder}; a stage owns files of its folder alone")
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Stamp:
    """The memory of one stage; `seconds` is negative while it is unfinished."""

    fingerprint: str
    seconds: float = -1.0
    value: Any = None


def _read(path: Path) -> _Stamp | None:
    if not path.exists():
        return None
    try:
        return _DECODER.decode(_Stamp, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, DataError) as cause:
        raise DataError(f"{path}: {cause}; delete the file, and the stage runs again") from cause


def _write(path: Path, stamp: _Stamp) -> None:
    write_whole(path, json.dumps(asdict(stamp)) + "\n")
