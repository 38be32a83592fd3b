from __future__ import annotations

from collections.abc import Iterator

import pytest

from verl.single_controller.cluster import RayConfig, cluster
from verl.single_controller.placement import HardwareConfig, ResourcePool


@pytest.fixture(scope="module")
def pool() -> Iterator[ResourcePool]:
    """Room for two workers on a local Ray."""
    hardware = HardwareConfig(devices_per_node=2)
    config = RayConfig(object_store_gib=0.25, log_to_driver=False, environment={"GREETING": "hello"})
    with cluster(config, hardware):
        pool = ResourcePool(hardware)
        yield pool
        pool.close()
