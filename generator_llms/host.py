"""Serve a model as a frozen generator: vLLM's OpenAI-compatible server, on GPUs or on the CPU.

    python -m generator_llms.host --model MODEL [--port 8000] [--tp 1] [options of vLLM ...]

Options that are not ours go to vLLM as they are, for example `--max-model-len 8192 --served-model-name NAME`.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from verl.errors import ConfigError

Device = Literal["cpu", "gpu"]


@dataclass(frozen=True, slots=True)
class HostConfig:
    """What is served and where.

    Attributes:
        model: folder of a checkpoint, or a name on the model hub.
        tp: tensor-parallel size, the number of GPUs that share the model.
        passthrough: further arguments of vLLM's server.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    tp: int = 1
    passthrough: tuple[str, ...] = ()


def parse(argv: Sequence[str]) -> HostConfig:
    """Read the command line; ends the process with usage if it is not well-formed."""
    default = {item.name: item.default for item in fields(HostConfig)}
    parser = argparse.ArgumentParser(
        prog="host.sh",
        description="Serve a frozen generator over vLLM; options not listed here go to vLLM.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="folder of a checkpoint, or a name on the model hub")
    parser.add_argument("--host", default=default["host"], help="address to bind (default: %(default)s)")
    parser.add_argument("--port", type=int, default=default["port"], help="default: %(default)s")
    parser.add_argument("--tp", type=int, default=default["tp"], help="tensor-parallel size (default: %(default)s)")
    known, passthrough = parser.parse_known_args(argv)
    return HostConfig(**vars(known), passthrough=tuple(passthrough))


def command(config: HostConfig, device: Device) -> list[str]:
    """Return the server's command line.

    The module is run instead of the `vllm` command, which does not start from the package's CPU build.
    """
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", config.model]
    line += ["--host", config.host, "--port", str(config.port), "--tensor-parallel-size", str(config.tp)]
    if device == "cpu" and "--enforce-eager" not in config.passthrough:
        line.append("--enforce-eager")
    return [*line, *config.passthrough]


def environment(config: HostConfig, device: Device, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the server's environment; what the user has set stays.

    On the CPU vLLM needs the size of its key-value cache (GiB), and by default pins the threads of every server on a
    machine to the same cores; without pinning the kernel spreads them. A local checkpoint never needs the model hub.
    """
    added: dict[str, str] = {}
    if device == "cpu":
        added |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if Path(config.model).is_dir():
        added["HF_HUB_OFFLINE"] = "1"
    return {**added, **inherited}


def check(config: HostConfig) -> None:
    """Refuse what vLLM would only refuse after a minute of loading.

    Raises:
        ConfigError: the checkpoint folder is missing or no checkpoint, or the port is in use.
    """
    folder = Path(config.model)
    # A name on the hub is OWNER/MODEL at most, so more slashes are a folder.
    looks_local = config.model.startswith((".", "/", "~")) or config.model.count("/") > 1 or folder.is_dir()
    if looks_local and not (folder / "config.json").is_file():
        raise ConfigError(f"--model {config.model}: no config.json there; expected the folder of a checkpoint")
    if config.tp < 1:
        raise ConfigError(f"--tp {config.tp}: expected at least 1")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except (OSError, OverflowError) as cause:
            raise ConfigError(
                f"--host {config.host} --port {config.port} cannot be bound: {cause}; stop what uses it or "
                "choose another"
            ) from cause


def detect_device() -> Device:
    """Return "gpu" if torch sees one that the installed build can use."""
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Check the arguments, then become the server; returns an exit code only when they are wrong."""
    config = parse(sys.argv[1:] if argv is None else argv)
    try:
        check(config)
    except ConfigError as error:
        sys.stderr.write(f"host.sh: {error}\n")
        return 2
    device = detect_device()
    line = command(config, device)
    os.execvpe(line[0], line, environment(config, device, os.environ))


if __name__ == "__main__":
    sys.exit(main())
