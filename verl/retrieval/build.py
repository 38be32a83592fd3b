"""Build an index: `python -m verl.retrieval.build --retriever_name N --corpus_path C --save_dir D`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from verl.errors import ConfigError, DataError, SearchAgentError
from verl.retrieval.corpus import Corpus
from verl.retrieval.encoder_spec import EncoderConfig
from verl.retrieval.engine import INFO_NAME, IndexInfo
from verl.retrieval.settings import RETRIEVERS, BM25Config, check_retriever

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What to build, besides which retriever over which corpus.

    Attributes:
        model: encoder in place of the retriever's own; not for BM25.
        overwrite: replace an index that is not the one asked for.
    """

    model: str | None = None
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    bm25: BM25Config = field(default_factory=BM25Config)
    overwrite: bool = False


def build_index(
    corpus: Corpus, retriever_name: str, save_dir: str | Path, options: BuildOptions | None = None
) -> IndexInfo:
    """Build an index into `save_dir`, or keep the one there if it is just that.

    The files are written beside `save_dir` and moved there when complete, so a build that is killed leaves nothing
    that could be loaded.

    Raises:
        ConfigError: unknown retriever, wrong options, a model that cannot be loaded, or `save_dir` holds something
            else and `options.overwrite` is off.
        DataError: the corpus cannot be indexed, or the folder cannot be written.
    """
    check_retriever(retriever_name)
    options, target = options or BuildOptions(), Path(save_dir)
    if retriever_name == "bm25" and options.model:
        raise ConfigError(f"retriever_model={options.model!r} was given for bm25, which has no model; leave it out")
    planned = _planned(corpus, retriever_name, options)
    if _is_built(target, planned, options.overwrite):
        logger.info("%s already holds this index; nothing to do", target)
        return planned
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
            workplace = Path(folder) / "index"
            workplace.mkdir()
            info = _write(corpus, retriever_name, options, workplace)
            info.save(workplace)
            _put_in_place(workplace, target, Path(folder) / "previous")
    except OSError as error:
        raise DataError(f"cannot write index {target} ({error}); free some space or pass another --save_dir") from error
    logger.info("built %s over %d documents in %s", retriever_name, info.documents, target)
    return info


def _put_in_place(new: Path, target: Path, previous: Path) -> None:
    """Rename `new` to `target`; what was there goes to `previous`, and back if the renaming fails."""
    if target.exists():
        target.rename(previous)
    try:
        new.rename(target)
    except OSError:
        if previous.exists():
            previous.rename(target)
        raise


def _planned(corpus: Corpus, retriever_name: str, options: BuildOptions) -> IndexInfo:
    # Imported here and below: torch and transformers take seconds, and BM25 needs neither.
    if retriever_name == "bm25":
        from verl.retrieval import bm25

        return bm25.index_info(corpus, options.bm25)
    from verl.retrieval import dense

    return dense.index_info(corpus, retriever_name, options.model)


def _write(corpus: Corpus, retriever_name: str, options: BuildOptions, folder: Path) -> IndexInfo:
    if retriever_name == "bm25":
        from verl.retrieval import bm25

        return bm25.write_index(corpus, folder, options.bm25)
    from verl.retrieval import dense

    return dense.write_index(corpus, folder, retriever_name, options.model, options.encoder)


def _is_built(target: Path, planned: IndexInfo, overwrite: bool) -> bool:
    """Whether `target` holds the planned index; refuses to replace anything else unless told to."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if not (target.is_dir() and (target / INFO_NAME).is_file()):
        raise ConfigError(f"save_dir {target} holds something that is no index; pass a new or an empty folder")
    if overwrite:
        return False
    found = IndexInfo.load(target)
    if found.same_as(planned):
        return True
    raise ConfigError(
        f"save_dir {target} holds another index ({found.retriever}, model {found.model}, corpus "
        f"{found.fingerprint[:12]}, {dict(found.settings)}); asked for {planned.retriever}, model {planned.model}, "
        f"corpus {planned.fingerprint[:12]}, {dict(planned.settings)}; pass --overwrite or another --save_dir"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Build an index from the command line."""
    parser = _parser()
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it reports every instruction set it does not find
    # Ends through the context managers, which take the unfinished files with them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        check_retriever(args.retriever_name)
        options = BuildOptions(
            model=args.retriever_model,
            encoder=EncoderConfig(args.device, args.batch_size),
            bm25=BM25Config(args.bm25_k1, args.bm25_b, args.bm25_stopwords, args.bm25_stemmer),
            overwrite=args.overwrite,
        )
        corpus = Corpus.open(args.corpus_path, args.corpus_cache)
        build_index(corpus, args.retriever_name, args.save_dir, options)
    except SearchAgentError as error:
        parser.exit(1, f"error: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m verl.retrieval.build", description="Build a retrieval index.")
    encoder, bm25 = EncoderConfig(), BM25Config()
    parser.add_argument("--retriever_name", required=True, help=f"one of {', '.join(RETRIEVERS)}")
    parser.add_argument(
        "--corpus_path", required=True, help="jsonl or jsonl.gz: id and contents, or id, title and text"
    )
    parser.add_argument("--save_dir", required=True, help="folder of the index")
    parser.add_argument("--corpus_cache", help="folder of the converted corpus (default: CORPUS_PATH.cache)")
    parser.add_argument("--retriever_model", help="encoder: local folder or Hugging Face name")
    parser.add_argument("--device", default=encoder.device, help="torch device of the encoder (default: a GPU if any)")
    for flag, default, meaning in (
        ("--batch_size", encoder.batch_size, "texts per forward pass of the encoder"),
        ("--bm25_k1", bm25.k1, "BM25 saturation of the term frequency"),
        ("--bm25_b", bm25.b, "BM25 weight of the document length"),
        ("--bm25_stopwords", bm25.stopwords, "english or none"),
        ("--bm25_stemmer", bm25.stemmer, "PyStemmer algorithm or none"),
    ):
        parser.add_argument(flag, type=type(default), default=default, help=f"{meaning} (default: {default})")
    parser.add_argument("--overwrite", action="store_true", help="replace another index in SAVE_DIR")
    return parser


if __name__ == "__main__":
    main()
