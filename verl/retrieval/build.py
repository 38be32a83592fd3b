"""Build an index: `python -m verl.retrieval.build --retriever_name N --corpus_path C --save_dir D`.

`build plan` says what each kind of dense index would need, `build tune` chooses how an index is searched, and
`build import` records which corpus a published FAISS file belongs to; each has a `--help`.
"""

from __future__ import annotations

import importlib
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from verl.errors import ConfigError, DataError, SearchAgentError
from verl.retrieval.build_flags import build_options, build_parser
from verl.retrieval.build_options import BuildOptions
from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import INFO_NAME, IndexInfo
from verl.retrieval.search_config import TUNING_NAME
from verl.retrieval.settings import check_retriever
from verl.retrieval.workplace import put_in_place, workplace

logger = logging.getLogger(__name__)

_SUBCOMMANDS = {
    "plan": "verl.retrieval.plan_cli",
    "tune": "verl.retrieval.tune_cli",
    "import": "verl.retrieval.import_index",
}


class Builder(Protocol):
    """Knows how one index is built."""

    @property
    def planned(self) -> IndexInfo:
        """What `index.json` will say, but for the files."""
        ...

    @property
    def write(self) -> Callable[[Path], IndexInfo]:
        """Writes the files of the index into a folder."""
        ...

    def finish(self, built: bool) -> None:
        """Do what remains once the index is in its place; `built` says that it was not there before."""
        ...


def build_index(
    corpus: Corpus, retriever_name: str, save_dir: str | Path, options: BuildOptions | None = None
) -> IndexInfo:
    """Build an index into `save_dir`, or keep the one there if it is just that.

    The files are written beside `save_dir` and moved there when complete, so a build that is killed leaves nothing
    that could be loaded; the vectors that a dense build had made by then are taken up by the next.

    Raises:
        ConfigError: unknown retriever, wrong options, a model that cannot be loaded, or `save_dir` holds something
            else and `options.overwrite` is off.
        DataError: the corpus cannot be indexed, or the folder cannot be written.
    """
    check_retriever(retriever_name)
    options, target = options or BuildOptions(), Path(save_dir)
    options.check(retriever_name)
    _check_target(target)
    builder = _builder(corpus, retriever_name, options, target)
    if _is_built(target, builder.planned, options.overwrite):
        logger.info("%s already holds this index", target)
        builder.finish(built=False)
        return IndexInfo.load(target)
    try:
        with workplace(target) as folder:
            new = folder / "index"
            new.mkdir()
            info = builder.write(new)
            info.save(new)
            put_in_place(new, target, folder / "previous")
    except OSError as error:
        raise DataError(f"cannot write index {target} ({error}); free some space or pass another --save_dir") from error
    logger.info("built %s over %d documents in %s", retriever_name, info.documents, target)
    builder.finish(built=True)
    return info


def _check_target(target: Path) -> None:
    """Refuse a folder that holds anything but an index, before any work is done."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target.is_dir() and (target / INFO_NAME).is_file()):
        raise ConfigError(f"save_dir {target} holds something that is no index; pass a new or an empty folder")


def _is_built(target: Path, planned: IndexInfo, overwrite: bool) -> bool:
    """Whether `target` holds the planned index; refuses to replace anything else unless told to."""
    if not (target / INFO_NAME).is_file():
        return False
    if overwrite:
        _check_replaceable(target)
        return False
    found = IndexInfo.load(target)
    if found.same_as(planned):
        return True
    keys = sorted({*found.settings, *planned.settings})
    changed = [key for key in keys if found.settings.get(key) != planned.settings.get(key)]
    there, asked = (
        f"{info.retriever}, model {info.model}, corpus {info.fingerprint[:12]}, "
        f"{ {key: info.settings.get(key) for key in changed} }"
        for info in (found, planned)
    )
    raise ConfigError(
        f"save_dir {target} holds another index ({there}); asked for {asked}; pass --overwrite or another --save_dir"
    )


def _check_replaceable(target: Path) -> None:
    """Refuse to replace a folder, such as one of downloads, where an index is not alone."""
    try:
        own = {Path(name).parts[0] for name in IndexInfo.load(target).files}
    except DataError:
        return
    strange = sorted({item.name for item in target.iterdir()} - {INFO_NAME, TUNING_NAME, *own}) if own else []
    if strange:
        raise ConfigError(
            f"save_dir {target} holds more than an index ({', '.join(strange[:3])}), and --overwrite would delete it; "
            "move that, or pass another --save_dir"
        )


def _builder(corpus: Corpus, retriever_name: str, options: BuildOptions, target: Path) -> Builder:
    # Imported here: torch, transformers and Java take seconds, and no index needs all of them.
    if retriever_name == "bm25":
        from verl.retrieval import bm25

        planned = bm25.index_info(corpus, options.bm25)
        return _WordBuilder(planned, lambda folder: bm25.write_index(corpus, folder, options.bm25))
    if retriever_name == "lucene":
        from verl.retrieval import lucene

        planned = lucene.index_info(corpus, options.lucene)
        return _WordBuilder(planned, lambda folder: lucene.write_index(corpus, folder, options.lucene))
    from verl.retrieval.dense_build import DenseBuilder

    return DenseBuilder(corpus, retriever_name, options, target)


@dataclass(frozen=True, slots=True)
class _WordBuilder:
    """Builds an index of words."""

    planned: IndexInfo
    write: Callable[[Path], IndexInfo]

    def finish(self, built: bool) -> None:
        pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; without its name, build."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given.pop(0) if given and given[0] in ("build", *_SUBCOMMANDS) else "build"
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it reports every instruction set it does not find
    # Ends through the context managers, which take the unfinished files with them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        (run if name == "build" else importlib.import_module(_SUBCOMMANDS[name]).run)(given)
    except SearchAgentError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)


def run(arguments: Sequence[str]) -> None:
    """Build an index as the command line says.

    Raises:
        ConfigError, DataError: see `build_index`.
    """
    args = build_parser().parse_args(arguments)
    check_retriever(args.retriever_name)
    options = build_options(args)
    corpus = Corpus.open(args.corpus_path, args.corpus_cache, args.on_error)
    build_index(corpus, args.retriever_name, args.save_dir, options)


if __name__ == "__main__":
    main()
