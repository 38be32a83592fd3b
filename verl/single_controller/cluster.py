"""Start Ray or join it, quietly and without the network."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

from verl.errors import ConfigError
from verl.single_controller.placement import HardwareConfig

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    # Otherwise Ray hides the GPUs from actors that ask for a share of 0, and says so at length.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class RayConfig:
    """How to reach Ray.

    Attributes:
        address: of a running cluster (`auto` finds the local one); null starts Ray on this machine.
        object_store_gib: shared memory of a Ray that is started here; null leaves the choice to Ray.
        log_to_driver: print what the workers print.
        environment: further variables of every worker.
    """

    address: str | None = None
    object_store_gib: float | None = None
    log_to_driver: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def cluster(config: RayConfig, hardware: HardwareConfig) -> Iterator[None]:
    """Run Ray for the duration of the block, or use the one that runs already and leave it running.

    Raises:
        ConfigError: there is no Ray at `config.address`.
    """
    if ray.is_initialized():
        yield
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    local = {} if config.address else _local_settings(config, hardware)
    try:
        ray.init(
            address=config.address,
            configure_logging=True,
            logging_level=logging.WARNING,
            log_to_driver=config.log_to_driver,
            runtime_env={"env_vars": {**_QUIET, **config.environment}},
            **local,
        )
    except ConnectionError as cause:
        raise ConfigError(
            f"ray.address={config.address}: no Ray answers there ({cause}); start it with `ray start --head`, or set "
            "ray.address=null to run on this machine alone"
        ) from cause
    try:
        yield
    finally:
        ray.shutdown()


def _local_settings(config: RayConfig, hardware: HardwareConfig) -> dict[str, Any]:
    """Size a local Ray by the hardware description, so that a laptop can run more workers than it has cores."""
    settings = {"num_cpus": max(1, math.ceil(hardware.cpus)), "include_dashboard": False}
    if config.object_store_gib is not None:
        settings["object_store_memory"] = int(config.object_store_gib * 2**30)
    return settings
