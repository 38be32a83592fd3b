"""Rows of a data set on the Hugging Face hub, or in a local folder of the same form, streamed through `datasets`.

A name is `hf:OWNER/NAME[:CONFIG][:SPLIT]`; without a split the one that the source's own split is called there. An
empty config is left out: `hf:OWNER/NAME::dev`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_preprocess.readers.files import Located
from verl.errors import ConfigError, DataError
from verl.typed import nearest

PREFIX = "hf:"
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "dev", "val", "valid"), "test": ("test",)}
"""What sets call their splits, by our names."""


@dataclass(frozen=True, slots=True)
class HubName:
    """Where a data set lies on the hub; None takes the default config and the split that is asked for."""

    dataset: str
    config: str | None = None
    split: str | None = None


def parse_name(path: str) -> HubName:
    """Read `hf:OWNER/NAME[:CONFIG][:SPLIT]`.

    Raises:
        ConfigError: it is something else.
    """
    dataset, *rest = path.removeprefix(PREFIX).split(":")
    if not dataset or len(rest) > 2:
        raise ConfigError(f"path={path!r}; expected hf:OWNER/NAME, hf:OWNER/NAME:CONFIG or hf:OWNER/NAME:CONFIG:SPLIT")
    config, split = [*rest, "", ""][:2]
    return HubName(dataset, config or None, split or None)


def read_hub(path: str, split: str) -> Iterator[Located]:
    """Yield the rows of one split; nothing is downloaded but what is read.

    Args:
        split: train, validation or test; what the set calls it is found out.

    Raises:
        ConfigError: malformed name.
        DataError: no such set, config or split, or the hub cannot be reached.
    """
    name = parse_name(path)
    import datasets  # takes seconds, and most sources are files

    chosen = _split(path, name, split)
    try:
        rows = datasets.load_dataset(name.dataset, name.config, split=chosen, streaming=True)
        for number, row in enumerate(rows):
            yield Located(f"{path}, split {chosen}, row {number}", row)
    except _errors() as cause:
        raise _failure(path, cause) from cause


def _split(path: str, name: HubName, split: str) -> str:
    import datasets

    try:
        found: Sequence[str] = datasets.get_dataset_split_names(name.dataset, name.config)
    except _errors() as cause:
        raise _failure(path, cause) from cause
    candidates = (name.split,) if name.split else SPLIT_NAMES[split]
    for candidate in candidates:
        if candidate in found:
            return candidate
    wanted = " or ".join(candidates)
    raise DataError(
        f"{path} has no split {wanted}; it has {', '.join(found) or 'none'}. Name one of them at the end: "
        f"hf:{name.dataset}:{name.config or ''}:{nearest(candidates[0], found) if found else 'SPLIT'}"
    )


def _errors() -> tuple[type[Exception], ...]:
    """What `datasets` raises for names that do not exist, hubs that cannot be reached, and broken files."""
    import datasets
    import httpx

    return (datasets.exceptions.DatasetsError, ValueError, OSError, httpx.HTTPError)


def _failure(path: str, cause: Any) -> DataError:
    return DataError(f"{path} cannot be read ({' '.join(str(cause).split())}); check its name, or give a local file")
