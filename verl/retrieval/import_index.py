"""`python -m verl.retrieval.build import`: take over a FAISS file that was published without a description."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from verl.errors import ConfigError, DataError
from verl.retrieval.build_flags import add_corpus_flags, add_encoder_choice
from verl.retrieval.corpus import Corpus
from verl.retrieval.dense import describe, open_engine
from verl.retrieval.encoder_spec import ENCODERS, EncoderConfig, Setting, read_overrides
from verl.retrieval.engine import INFO_NAME, IndexInfo
from verl.retrieval.settings import check_retriever

logger = logging.getLogger(__name__)


def import_index(
    index_path: str | Path,
    corpus: Corpus,
    retriever_name: str,
    model: str | None = None,
    encoder: EncoderConfig | None = None,
    encoder_overrides: Mapping[str, Setting] | None = None,
) -> IndexInfo:
    """Check a bare FAISS file against its corpus and encoder, and write `index.json` beside it.

    Args:
        index_path: the file, or a folder with just one `.index` file.

    Raises:
        ConfigError: no dense retriever, another encoder, or there is an `index.json` already.
        DataError: the file is damaged or of another corpus, or `index.json` cannot be written.
    """
    check_retriever(retriever_name)
    path = Path(index_path)
    folder = path if path.is_dir() else path.parent
    if retriever_name not in ENCODERS:
        raise ConfigError(f"import is for FAISS indexes; retriever_name={retriever_name} is none")
    if not path.exists():
        raise DataError(f"index {path}: no such file or folder")
    if (folder / INFO_NAME).exists():
        raise ConfigError(f"{folder} has an {INFO_NAME} already; delete it to import the index anew")
    described = describe(path, corpus, retriever_name, model)
    engine = open_engine(folder, corpus, described, encoder=encoder, encoder_overrides=encoder_overrides)
    engine.close()
    try:
        engine.index.save(folder)
    except OSError as error:
        raise DataError(f"cannot write {folder / INFO_NAME} ({error}); make the folder writable") from error
    logger.info("%s: %d vectors are those of %s", path, engine.index.documents, corpus.path)
    return engine.index


def run(arguments: Sequence[str]) -> None:
    """Import an index as the command line says.

    Raises:
        ConfigError, DataError: see `import_index`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m verl.retrieval.build import",
        description="Check a FAISS file that has no index.json, such as the published e5_Flat.index, against its "
        "corpus and encoder, and write index.json beside it.",
    )
    parser.add_argument("--index_path", required=True, help="the .index file, or a folder with just one")
    parser.add_argument("--retriever_name", required=True, help=f"one of {', '.join(ENCODERS)}")
    add_corpus_flags(parser)
    add_encoder_choice(parser)
    args = parser.parse_args(arguments)
    corpus = Corpus.open(args.corpus_path, args.corpus_cache, args.on_error)
    overrides = read_overrides(args.encoder_spec)
    model, config = args.retriever_model, EncoderConfig(args.device)
    import_index(args.index_path, corpus, args.retriever_name, model, config, overrides)
