"""N Ray actors that host one class, called together.

    with cluster(RayConfig(), hardware):
        pool = ResourcePool(hardware)
        group = WorkerGroup(TrainWorker, (config,), pool.placed("train"))
        group.call("init")
        logprobs = group.dispatch("actor_log_probs", batch)   # (B, S), rows in the order of the batch
        stats = group.call("update_actor", batch)[0]

A failure of one worker ends the group, because the others may be waiting for it in a collective for ever.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.batch import Batch
from verl.errors import WorkerError
from verl.single_controller.dispatch import split
from verl.single_controller.placement import Placed, Slot

_log = logging.getLogger(__name__)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class _Host:
    """What runs in the Ray actor: one instance of a class."""

    def __init__(self) -> None:
        self._worker: Any = None

    def address(self) -> tuple[str, int]:
        """Return this node's address and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def build(self, kind: type, args: tuple, environment: Mapping[str, str]) -> None:
        """Set the environment and construct the worker."""
        os.environ.update(environment)
        self._worker = kind(*args)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call the worker."""
        return getattr(self._worker, method)(*args, **kwargs)


class _AsyncHost(_Host):
    """The same for a class with coroutine methods, which then run concurrently in one event loop."""

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call the worker and await what it returns if that is awaitable."""
        result = getattr(self._worker, method)(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result


@dataclass(frozen=True)
class Endpoint:
    """One worker, callable from any process of the cluster."""

    handle: ActorHandle
    rank: int

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call `method` and wait for the answer.

        Raises:
            WorkerError: the worker raised or died.
        """
        try:
            return ray.get(self.handle.call.remote(method, *args, **kwargs))
        except RayError as cause:
            raise _worker_error(self.rank, method, cause) from cause


class Pending:
    """A call that runs on all workers of a group."""

    def __init__(self, group: WorkerGroup, method: str, refs: list[ray.ObjectRef]) -> None:
        """Remember what was called; `refs[rank]` is where the answer of a worker will be."""
        self._group = group
        self._method = method
        self.refs = refs

    def result(self, timeout: float | None = None) -> list[Any]:
        """Wait for all workers and return their answers by rank.

        Raises:
            WorkerError: a worker raised, died, or did not answer within `timeout` seconds. The group has ended then.
        """
        return self._collect(self.refs, timeout)

    def hand_over(self) -> ray.ObjectRef:
        """Wait for all workers but rank 0 and return where rank 0's answer will be, without fetching it.

        Passed on as an argument, a large answer goes from worker to worker and past this process.

        Raises:
            WorkerError: see `result`; an error of rank 0 shows up where its answer is used.
        """
        self._collect(self.refs[1:], None)
        return self.refs[0]

    def _collect(self, refs: list[ray.ObjectRef], timeout: float | None) -> list[Any]:
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = list(refs)
        answers: dict[ray.ObjectRef, Any] = {}
        while waiting:
            # One at a time as they end: waiting for rank 0 first would not notice that rank 1 has died meanwhile.
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            done, waiting = ray.wait(waiting, num_returns=1, timeout=left)
            if not done:
                late = [self.refs.index(ref) for ref in waiting]
                raise self._group.fail(f"workers {late} did not answer {self._method!r} within {timeout:g} s")
            answers[done[0]] = self._get(done[0])
        return [answers[ref] for ref in refs]

    def _get(self, ref: ray.ObjectRef) -> Any:
        try:
            return ray.get(ref)
        except RayError as cause:
            error = _worker_error(self.refs.index(ref), self._method, cause)
            raise self._group.fail(str(error)) from cause


class WorkerGroup:
    """N workers of one class; rank 0's node hosts the rendezvous of their process group."""

    def __init__(self, kind: type, args: tuple, placed: Placed, timeout: float = 300.0) -> None:
        """Start the workers and construct `kind(*args)` in each.

        A worker finds its place in the variables that torchrun would set: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR
        and MASTER_PORT. Ray shows each worker only its own GPUs, so LOCAL_RANK is 0. If `kind` has coroutine methods,
        calls to one worker run concurrently.

        Args:
            args: of the constructor; the same for all.
            timeout: seconds until all workers must stand.

        Raises:
            WorkerError: a constructor raised, or the workers did not start in time.
        """
        self.kind = kind
        self._cause = ""
        methods = inspect.getmembers(kind, inspect.iscoroutinefunction)
        host = ray.remote(_AsyncHost if methods else _Host)
        self.handles: list[ActorHandle] = [host.options(**_options(placed, slot)).remote() for slot in placed.slots]
        address, port = Pending(self, "address", [self.handles[0].address.remote()]).result(timeout)[0]
        shared = {"WORLD_SIZE": str(len(self)), "LOCAL_RANK": "0", "MASTER_ADDR": address, "MASTER_PORT": str(port)}
        refs = [
            handle.build.remote(kind, args, {**shared, "RANK": str(rank)}) for rank, handle in enumerate(self.handles)
        ]
        Pending(self, "__init__", refs).result(timeout)

    def __len__(self) -> int:
        return len(self.handles)

    def start(self, method: str, *args: Any, **kwargs: Any) -> Pending:
        """Begin a call on all workers with the same arguments, which travel to each node once.

        Raises:
            WorkerError: the group has ended, or its class has no such method.
        """
        self._check(method)
        stored = [_stored(argument) for argument in args]
        return Pending(self, method, [handle.call.remote(method, *stored, **kwargs) for handle in self.handles])

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call `method` on all workers and return their answers by rank.

        Raises:
            WorkerError: see `start` and `Pending.result`.
        """
        return self.start(method, *args, **kwargs).result()

    def start_each(self, method: str, arguments: Sequence[tuple]) -> Pending:
        """Begin a call on all workers, with `arguments[rank]` for each.

        Raises:
            WorkerError: see `start`.
        """
        self._check(method)
        calls = zip(self.handles, arguments, strict=True)
        return Pending(self, method, [handle.call.remote(method, *own) for handle, own in calls])

    def dispatch(self, method: str, batch: Batch, *args: Any) -> Any:
        """Split `batch` over the workers by token count, call `method(part, *args)` on each, and merge the answers.

        Returns:
            See `verl.single_controller.dispatch.Split.merge`.

        Raises:
            WorkerError: see `call`.
        """
        parts, plan = split(batch, len(self))
        return plan.merge(self.start_each(method, [(part, *args) for part in parts]).result())

    def endpoints(self) -> list[Endpoint]:
        """Return the workers, to be called by other workers."""
        return [Endpoint(handle, rank) for rank, handle in enumerate(self.handles)]

    def fail(self, cause: str) -> WorkerError:
        """End the group and return the error to raise."""
        if not self._cause:
            _log.error("worker group %s ends: %s", self.kind.__name__, cause.splitlines()[0])
        self._cause = self._cause or cause
        self.close()
        return WorkerError(cause)

    def close(self) -> None:
        """End the workers. Calls that still run fail."""
        self._cause = self._cause or "it was closed"
        for handle in self.handles:
            ray.kill(handle)

    def _check(self, method: str) -> None:
        if self._cause:
            raise WorkerError(f"the {self.kind.__name__} group has ended ({self._cause}); start another one")
        if not callable(getattr(self.kind, method, None)):
            names = [name for name, _ in inspect.getmembers(self.kind, callable) if not name.startswith("_")]
            raise WorkerError(f"{self.kind.__name__} has no method {method!r}; it has {', '.join(names)}")


def _options(placed: Placed, slot: Slot) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": slot.cpus, "num_gpus": slot.gpus, "max_restarts": 0}
    if placed.group is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            placement_group=placed.group,
            placement_group_bundle_index=slot.bundle,
            placement_group_capture_child_tasks=True,
        )
    if slot.environment:
        options["runtime_env"] = {"env_vars": dict(slot.environment)}
    return options


def _stored(argument: Any) -> Any:
    return argument if isinstance(argument, ray.ObjectRef) else ray.put(argument)


def _worker_error(rank: int, method: str, cause: RayError) -> WorkerError:
    if isinstance(cause, RayTaskError):
        return WorkerError(f"worker {rank} failed in {method!r}:\n{_COLOUR.sub('', str(cause)).strip()}")
    if isinstance(cause, GetTimeoutError):
        return WorkerError(f"worker {rank} did not answer {method!r} in time")
    if isinstance(cause, RayActorError):
        return WorkerError(f"worker {rank} died during {method!r} (killed, or out of memory?): {cause}")
    return WorkerError(f"worker {rank} was lost during {method!r}: {type(cause).__name__}: {cause}")
