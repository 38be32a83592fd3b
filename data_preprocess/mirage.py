"""Build the question parquet of MIRAGE: five medical sets of multiple-choice questions.

    python -m data_preprocess.mirage path=benchmark.json.gz output=data/mirage
    python -m data_preprocess.mirage path=benchmark.json output=data/pubmedqa subsets=[pubmedqa]

Every question goes to `output/test.parquet` as published: its text ends with the options, its golden answer is the
right one's line, and its id is `SET/test/ID`. A retriever is not asked for the options: `retrieval_query` of
`data_preprocess.readers.mirage` says what it is asked. All questions of the benchmark stay, also those worded alike.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from data_preprocess import qa
from data_preprocess.qa import OnError, QaConfig, SampleConfig
from data_preprocess.qa_select import Kept, summary_table
from data_preprocess.readers.source import SourceConfig
from verl.config import run_entry

Subset = Literal["medqa", "medmcqa", "pubmedqa", "bioasq", "mmlu"]


@dataclass(frozen=True)
class MirageConfig:
    """What to build.

    Attributes:
        path: the published `benchmark.json`, gzipped or not.
        output: folder of the parquet and the summary.
        subsets: sets to keep.
        sample: at most so many questions of each set; all if None.
        prompt, seed, limit, on_error: as in `data_preprocess.qa.QaConfig`.
    """

    path: Path
    output: Path
    subsets: tuple[Subset, ...] = get_args(Subset)
    sample: int | None = None
    prompt: str = qa.BARE
    seed: int = QaConfig.seed
    limit: int | None = None
    on_error: OnError = "raise"

    def __post_init__(self) -> None:
        if not self.subsets:
            raise ValueError(f"subsets is empty; expected some of {', '.join(get_args(Subset))}")
        self.as_qa()  # the same checks

    def as_qa(self) -> QaConfig:
        """Return the same build in the words of `data_preprocess.qa`."""
        source = SourceConfig(path=str(self.path), split="test", format="mirage", subsets=self.subsets)
        return QaConfig(
            output=self.output,
            sources={"mirage": source},
            prompt=self.prompt,
            sample=SampleConfig(test=self.sample),
            seed=self.seed,
            limit=self.limit,
            dedupe=False,
            on_error=self.on_error,
        )


def build(config: MirageConfig) -> list[Kept]:
    """Build as configured; returns and raises as `data_preprocess.qa.build`."""
    return qa.build(config.as_qa())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("mirage", MirageConfig, sys.argv[1:] if arguments is None else arguments, _main)


def _main(config: MirageConfig) -> None:
    sys.stdout.write(summary_table(build(config)))


if __name__ == "__main__":
    sys.exit(main())
