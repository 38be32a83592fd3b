"""Hydra composes YAML and command-line overrides; strict, frozen dataclasses receive them.

Every default stands once, in the dataclass that declares it; the YAML files under `configs/` state deviations only.
A key that no dataclass declares fails with the nearest valid one, whether it came from a file or from the command
line. Entry points declare their own schema out of the components' config dataclasses and call `run_entry`.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.errors import ConfigError, SearchAgentError
from verl.typed import REQUIRED, Decoder, describe, encode, leaves, nearest

T = TypeVar("T")

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
_DECODER = Decoder(error=ConfigError)
_MISSING = "???"


def build(schema: type[T], mapping: Mapping[str, Any]) -> T:
    """Build a frozen config dataclass from a plain mapping; keys left out take their defaults.

    Raises:
        ConfigError: unknown key (with the nearest valid one), wrong type, missing required key, or a value that the
            dataclass itself refuses.
    """
    return _DECODER.decode(schema, mapping)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain dicts, lists and scalars; `build` inverts it."""
    return encode(config)


def to_yaml(config: Any) -> str:
    """Return a config dataclass as YAML, every key spelt out."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def compose(config_name: str, overrides: Sequence[str], schema: type[T], config_dir: Path = CONFIG_DIR) -> T:
    """Compose `configs/{config_name}.yaml`, its groups and the overrides into a `schema`.

    Overrides follow Hydra's grammar: `key.sub=value` sets a key (whether or not the YAML names it), `group=choice`
    picks a file of a group, `~key` drops what the YAML says. Interpolations such as `${seed}` see the defaults of the
    dataclasses too.

    Raises:
        ConfigError: as `build`; also an unknown config, group choice or a malformed override.
    """
    directory = config_dir.resolve()
    _check_choice("config", config_name, directory)
    lines = [_normalise(line, directory) for line in overrides]
    try:
        with initialize_config_dir(config_dir=str(directory), version_base="1.3"):
            stated = hydra_compose(config_name, lines)
        mapping = _resolve(stated, schema)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as cause:
        raise ConfigError(f"config {config_name!r}: {_one_line(cause)}") from cause
    return build(schema, mapping)


def run_entry(
    config_name: str,
    schema: type[T],
    argv: Sequence[str],
    fn: Callable[[T], None],
    config_dir: Path = CONFIG_DIR,
) -> int:
    """Run an entry point: compose its config from `argv` and call `fn` with it.

    `--help` prints every key with its type and default; `--cfg job` prints the composed config and runs nothing.

    Returns:
        The process's exit code: 0, 2 after a `ConfigError`, which is told in one line on stderr, or 1 after another
        error that this project raises on purpose, told with its notes. Bugs propagate.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("httpx", "httpx2"):  # a line for every request
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        if "--help" in argv or "-h" in argv:
            sys.stdout.write(help_text(config_name, schema, config_dir))
            return 0
        overrides, dry_run = _split_flags(argv)
        config = compose(config_name, overrides, schema, config_dir)
        if dry_run:
            sys.stdout.write(to_yaml(config))
            return 0
        with _ended_in_order():
            fn(config)
    except ConfigError as error:
        sys.stderr.write(f"error: {_one_line(error)}\n")
        return 2
    except SearchAgentError as error:
        sys.stderr.write("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]) + "\n")
        return 1
    return 0


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Have SIGTERM unwind the stack, so that engines and services end with us instead of being left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def help_text(config_name: str, schema: type, config_dir: Path = CONFIG_DIR) -> str:
    """Return usage, the groups with their choices, and every key with its type and default."""
    lines = [
        f"Options of {config_name!r}: key=value ... [group=choice ...] [--cfg job] [--help]",
        "",
        "--cfg job   print the composed config and exit",
    ]
    groups = {path.name: _choices(path) for path in sorted(config_dir.iterdir()) if path.is_dir()}
    if groups:
        lines += ["", "Groups:"] + [f"  {name} = {' | '.join(choices)}" for name, choices in groups.items()]
    lines += ["", "Keys (type, default before any YAML):"]
    for leaf in leaves(schema):
        default = "required" if leaf.default is REQUIRED else f"default {_shown(leaf.default)}"
        lines.append(f"  {leaf.key}: {describe(leaf.kind)}; {default}")
    return "\n".join(lines) + "\n"


def _split_flags(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Separate `--cfg job` from the overrides."""
    overrides: list[str] = []
    dry_run = False
    words = iter(argv)
    for word in words:
        if word in ("--cfg", "--cfg=job"):
            value = word.partition("=")[2] or next(words, "")
            if value != "job":
                raise ConfigError(f"--cfg {value}: expected --cfg job")
            dry_run = True
        elif word.startswith("-"):
            raise ConfigError(f"unknown flag {word!r}; expected --help, --cfg job or overrides of the form key=value")
        else:
            overrides.append(word)
    return overrides, dry_run


def _normalise(line: str, directory: Path) -> str:
    """Check one override and let it set keys that the YAML does not mention (`build` checks them later)."""
    override = _parse(line)
    key = override.key_or_group
    if override.is_sweep_override():
        raise ConfigError(f"override {line!r} lists several values; write a list as {key}=[a,b] or quote the comma")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        raise ConfigError(f"override {line!r}: Hydra's own settings are not used here; remove it")
    if (directory / key).is_dir():
        if override.value() is None and not override.is_delete():
            raise ConfigError(f"{key}=null; expected one of {', '.join(_choices(directory / key))}, or leave {key} out")
        for choice in _selected(override):
            _check_choice(key, choice, directory / key)
        return line
    if override.is_delete():
        return line
    return "++" + line.lstrip("+")


def _parse(line: str) -> Override:
    try:
        return OverridesParser.create().parse_override(line)
    except HydraException as cause:
        raise ConfigError(f"override {line!r} is malformed; expected key=value ({_one_line(cause)})") from cause


def _selected(override: Override) -> list[str]:
    value = override.value()
    if value is None or override.is_delete():
        return []
    return [str(choice) for choice in (value if isinstance(value, list) else [value])]


def _check_choice(group: str, choice: str, directory: Path) -> None:
    if not directory.is_dir():
        raise ConfigError(f"config directory {directory} does not exist; run from a checkout with its configs/ folder")
    if (directory / f"{choice}.yaml").is_file():
        return
    choices = _choices(directory)
    if not choices:
        raise ConfigError(f"{group} {choice!r}: {directory} holds no YAML file")
    near = nearest(choice, choices)
    raise ConfigError(f"unknown {group} {choice!r}; did you mean {near!r}? Choices: {', '.join(choices)}")


def _choices(directory: Path) -> list[str]:
    return sorted(path.stem for path in directory.glob("*.yaml"))


def _resolve(stated: DictConfig, schema: type) -> dict[str, Any]:
    """Resolve interpolations against the stated keys on top of the schema's defaults; return the stated keys only."""
    defaults: dict[str, Any] = {}
    for leaf in leaves(schema):
        if leaf.default is not REQUIRED:
            _insert(defaults, leaf.key.split("."), encode(leaf.default))
    merged = OmegaConf.to_container(OmegaConf.merge(defaults, stated), resolve=True, throw_on_missing=False)
    return _restrict(merged, OmegaConf.to_container(stated, resolve=False))


def _insert(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _restrict(tree: Any, keys: Any) -> Any:
    """Keep of `tree` what `keys` states; YAML's `???` (required, not given) counts as not stated."""
    if not isinstance(keys, dict) or not isinstance(tree, dict):
        return tree
    return {key: _restrict(tree[key], entry) for key, entry in keys.items() if entry != _MISSING}


def _shown(value: Any) -> str:
    return yaml.safe_dump(encode(value), default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
