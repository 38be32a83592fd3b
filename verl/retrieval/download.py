"""Fetch the published corpora, indexes, data and checkpoints: `python scripts/download.py --save_path DIR`.

A run that is killed goes on where it stopped; what is complete is not asked for again. `.downloads.json` in the folder
says what is.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from verl.errors import DataError, SearchAgentError
from verl.retrieval.assemble import join, unfinished_path, unzip
from verl.retrieval.hub import Patience, RemoteFile, RepoKind, fetch, list_files
from verl.typed import Decoder, encode

logger = logging.getLogger(__name__)

_LEDGER_NAME = ".downloads.json"
_LOCK_NAME = ".downloads.lock"
_UNZIPPED_TO_ZIPPED = 3.0
"""How much larger English text is than its gzip, for the estimate of the space that is needed."""


@dataclass(frozen=True, slots=True)
class Item:
    """Something that can be downloaded.

    Attributes:
        meaning: for the help text.
        product: what there is in the end, a file, or a folder for `make="files"`.
        make: `files` fetches the whole repository, `join` appends `files` to one another, `unzip` unpacks the one.
    """

    meaning: str
    repo: str
    kind: RepoKind
    product: str
    make: Literal["files", "join", "unzip"] = "files"
    files: tuple[str, ...] = ()


ITEMS: Mapping[str, Item] = {
    "index": Item(
        "flat e5 index of wiki-18, 61 GiB, twice that while its parts are joined",
        "PeterJinGo/wiki-18-e5-index",
        "dataset",
        "e5_Flat.index",
        "join",
        ("part_aa", "part_ab"),
    ),
    "corpus": Item(
        "the 21 million passages of wiki-18",
        "PeterJinGo/wiki-18-corpus",
        "dataset",
        "wiki-18.jsonl",
        "unzip",
        ("wiki-18.jsonl.gz",),
    ),
    "bm25": Item("Lucene index of wiki-18", "PeterJinGo/wiki-18-bm25-index", "dataset", "wiki-18-bm25-index"),
    "data": Item("prepared questions of s3", "pat-jj/s3_processed_data", "dataset", "s3_processed_data"),
    "medcorp_textbooks": Item(
        "MedCorp: 126 thousand chunks of medical textbooks", "MedRAG/textbooks", "dataset", "medcorp/textbooks"
    ),
    "medcorp_pubmed": Item("MedCorp: 23.9 million abstracts of PubMed", "MedRAG/pubmed", "dataset", "medcorp/pubmed"),
    "medcorp_wikipedia": Item(
        "MedCorp: 29.9 million chunks of Wikipedia", "MedRAG/wikipedia", "dataset", "medcorp/wikipedia"
    ),
    "checkpoint": Item("searcher of s3 after 20 steps", "pat-jj/s3-8-3-3-20steps", "model", "s3-8-3-3-20steps"),
}
USUAL = ("index", "corpus")


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """How things are fetched.

    Attributes:
        endpoint: address of the hub; see `verl.retrieval.hub.list_files`.
        delete_parts: delete the parts of a joined file and the gzip of an unzipped one once the product is complete.
        patience: with the network.
        free_bytes: tells the free space of a folder.
    """

    endpoint: str | None = None
    delete_parts: bool = False
    patience: Patience = field(default_factory=Patience)
    free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free


def download(
    names: Sequence[str], save_path: Path, options: DownloadOptions | None = None, items: Mapping[str, Item] = ITEMS
) -> None:
    """Fetch `names`, keys of `items`, into `save_path`, one after the other.

    Raises:
        DataError: the hub does not answer or sends something else, the space does not suffice, something else has the
            name of a product, or another process downloads into `save_path`.
    """
    options = options or DownloadOptions()
    try:
        save_path.mkdir(parents=True, exist_ok=True)
        with _alone_in(save_path):
            ledger = _Ledger(save_path)
            for name in names:
                _obtain(name, items[name], ledger, options)
    except OSError as error:
        raise DataError(f"cannot write into {save_path} ({error}); free some space and run again to go on") from error


def _obtain(name: str, item: Item, ledger: _Ledger, options: DownloadOptions) -> None:
    if ledger.done(name):
        logger.info("%s is complete: %s", name, ledger.folder / item.product)
    else:
        remote = _wanted(name, item, list_files(item.repo, item.kind, options.endpoint, options.patience))
        if not _adopted(item, remote, ledger):
            _check_space(item, remote, ledger, options)
            for file in remote:
                _fetch_one(file, _path_of(item, file), ledger, options.patience)
            _make(item, remote, ledger)
        paths = [_path_of(item, file) for file in remote] if item.make == "files" else [item.product]
        ledger.finish(name, paths)
        logger.info("%s: %s", name, ledger.folder / item.product)
    if options.delete_parts and item.make != "files":
        for part in item.files:
            (ledger.folder / part).unlink(missing_ok=True)


def _wanted(name: str, item: Item, found: Sequence[RemoteFile]) -> list[RemoteFile]:
    by_name = {file.name: file for file in found}
    missing = [file for file in item.files if file not in by_name]
    if missing or not found:
        holds = ", ".join(sorted(by_name)[:8]) or "nothing"
        lacking = f"no {', '.join(missing)}" if missing else "no file"
        raise DataError(f"{name}: {item.kind} {item.repo} holds {lacking} (found {holds})")
    return [by_name[file] for file in item.files] if item.files else list(found)


def _path_of(item: Item, file: RemoteFile) -> str:
    """Return where a fetched file goes, relative to the folder of the downloads."""
    return f"{item.product}/{file.name}" if item.make == "files" else file.name


def _adopted(item: Item, remote: Sequence[RemoteFile], ledger: _Ledger) -> bool:
    """Whether a product that the ledger does not know is there and right; refuses to replace another."""
    product = ledger.folder / item.product
    if item.make == "files" or not product.exists() or ledger.knows(item.product):
        return False
    if item.make == "join" and product.stat().st_size == sum(file.bytes for file in remote):
        logger.info("%s is there already; comparing its checksums", product)
        offsets = [sum(file.bytes for file in remote[:at]) for at in range(len(remote))]
        if all(file.matches(product, offset) for file, offset in zip(remote, offsets, strict=True)):
            return True
    if item.make == "unzip" and ledger.holds(remote[0].name, remote[0].digest):
        return False  # killed between the last byte and the entry in the ledger: unzip again
    raise DataError(f"{product} exists, and is not known to be complete; move it away, or pass another --save_path")


def _check_space(item: Item, remote: Sequence[RemoteFile], ledger: _Ledger, options: DownloadOptions) -> None:
    needed = float(sum(_missing_bytes(file, _path_of(item, file), ledger) for file in remote))
    size = sum(file.bytes for file in remote)
    if item.make == "join":
        unfinished = unfinished_path(ledger.folder / item.product)
        needed += size - (unfinished.stat().st_size if unfinished.exists() else 0)
    elif item.make == "unzip":
        needed += _UNZIPPED_TO_ZIPPED * size
    free = options.free_bytes(ledger.folder)
    if needed > free:
        raise DataError(
            f"{item.product} needs about {needed / 2**30:.1f} GiB more in {ledger.folder}, which has "
            f"{free / 2**30:.1f} GiB free; free some space or pass another --save_path"
        )


def _missing_bytes(file: RemoteFile, path: str, ledger: _Ledger) -> int:
    target, partial = ledger.folder / path, file.partial(ledger.folder / path)
    if ledger.holds(path, file.digest) or (target.exists() and not ledger.knows(path)):
        return 0
    return file.bytes - (partial.stat().st_size if partial.exists() else 0)


def _fetch_one(file: RemoteFile, path: str, ledger: _Ledger, patience: Patience) -> None:
    target = ledger.folder / path
    if ledger.holds(path, file.digest):
        return
    if target.exists() and not ledger.knows(path) and not file.is_at(target):
        raise DataError(
            f"{target} exists, and is not the file that {file.url} names; move it away, or pass another --save_path"
        )
    if not target.exists() or ledger.knows(path):
        for stale in target.parent.glob(f"{target.name}.*.partial"):
            if stale != file.partial(target):
                stale.unlink()
        fetch(file, target, patience)
    ledger.add(path, file.digest)


def _make(item: Item, remote: Sequence[RemoteFile], ledger: _Ledger) -> None:
    product = ledger.folder / item.product
    if item.make == "join":
        join([ledger.folder / file.name for file in remote], product)
    elif item.make == "unzip":
        unzip(ledger.folder / remote[0].name, product)
    if item.make != "files":
        ledger.add(item.product, "+".join(file.digest for file in remote))


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    with (folder / _LOCK_NAME).open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process downloads into {folder}; wait for it, or pass another folder") from error
        except OSError as error:
            logger.warning("cannot lock %s (%s); do not download into it twice at a time", folder, error)
        yield


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file whose content was checked when it had this size."""

    bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class _Pages:
    """Content of the ledger: files and finished items, paths relative to its folder."""

    files: Mapping[str, _Entry] = field(default_factory=dict)
    items: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class _Ledger:
    """Remembers which files of a folder are complete, so that nothing of 60 GB is read again to find out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / _LEDGER_NAME
        try:
            self._pages = Decoder(error=DataError).decode(_Pages, json.loads(self._path.read_text("utf-8")))
        except FileNotFoundError:
            self._pages = _Pages()
        except (ValueError, DataError) as error:
            logger.warning("%s cannot be read (%s); what is there will be checked again", self._path, error)
            self._pages = _Pages()

    def knows(self, path: str) -> bool:
        """Whether the file came from here, in whatever version."""
        return path in self._pages.files

    def holds(self, path: str, digest: str | None = None) -> bool:
        """Whether the file is complete, and of this digest if one is given."""
        entry, file = self._pages.files.get(path), self.folder / path
        if entry is None or not file.is_file() or file.stat().st_size != entry.bytes:
            return False
        return digest in (None, entry.digest)

    def done(self, item: str) -> bool:
        """Whether an item is complete."""
        return item in self._pages.items and all(self.holds(path) for path in self._pages.items[item])

    def add(self, path: str, digest: str) -> None:
        """Remember a complete file."""
        entry = _Entry((self.folder / path).stat().st_size, digest)
        self._save(_Pages({**self._pages.files, path: entry}, self._pages.items))

    def finish(self, item: str, paths: Sequence[str]) -> None:
        """Remember a complete item."""
        for path in paths:
            if not self.knows(path):
                self.add(path, "")
        self._save(_Pages(self._pages.files, {**self._pages.items, item: tuple(paths)}))

    def _save(self, pages: _Pages) -> None:
        self._pages = pages
        unfinished = unfinished_path(self._path)
        unfinished.write_text(json.dumps(encode(pages), indent=1) + "\n", "utf-8")
        os.replace(unfinished, self._path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Download from the command line."""
    width = max(map(len, ITEMS)) + 2
    known = "\n".join(f"  {name:<{width}}{item.meaning} ({item.repo})" for name, item in ITEMS.items())
    parser = argparse.ArgumentParser(
        prog="python scripts/download.py",
        description=f"Download what is published.\n\n{known}\n\nHF_ENDPOINT names another hub; a killed run goes on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--save_path", required=True, help="folder for all of it")
    parser.add_argument(
        "--what", nargs="+", choices=tuple(ITEMS), default=list(USUAL), help=f"default: {' '.join(USUAL)}"
    )
    parser.add_argument("--delete_parts", action="store_true", help="delete parts and gzips once joined and unzipped")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request with its signed address
    try:
        download(args.what, Path(args.save_path), DownloadOptions(delete_parts=args.delete_parts))
    except SearchAgentError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
