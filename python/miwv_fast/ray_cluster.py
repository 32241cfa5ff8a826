"""The Ray session that a run uses: found or started, how many workers fit into it, and how quiet it is."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.data.context import DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from miwv_fast.info import package_versions

_log = logging.getLogger(__name__)
_NOISY = ("ray", "ray.data")
_CONNECT_SECONDS = 10
_UNREACHABLE = "is it running (ray status), and is this a machine of it?"
_PATIENCE = 5  # seconds for which a worker finds no room before that is told
_INIT_DEATHS = 10  # machines may die while their actors load the model
_SHARED = ("miwv-fast", "transformers", "tokenizers")  # what this process and the workers must agree on


@dataclass(frozen=True)
class Cluster:
    """A Ray session and the workers that a stage gets in it.

    `own`: it was started or joined here, and is left when the run ends.
    """

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    own: bool
    verbose: bool

    @property
    def threads(self) -> int:
        """Threads that a worker computes with on a CPU."""
        return max(1, int(self.cpus_per_worker))

    @property
    def resources(self) -> dict[str, float]:
        """What a worker asks Ray for."""
        return {"num_cpus": self.cpus_per_worker, "num_gpus": self.gpus_per_worker}

    def fits(self, machine: dict[str, float]) -> bool:
        """Whether a machine with these resources has room for a worker."""
        return machine.get("CPU", 0.0) >= self.cpus_per_worker and machine.get("GPU", 0.0) >= self.gpus_per_worker

    @contextmanager
    def data_context(self) -> Iterator[None]:
        """Ray Data's settings for a stage; those of the caller are as before afterwards."""
        context = DataContext.get_current().copy()
        context.enable_progress_bars = context.print_on_execution_start = self.verbose
        context.enable_auto_log_stats = False
        context.max_errored_blocks = 0
        context.max_consecutive_actor_init_deaths = _INIT_DEATHS
        with DataContext.current(context):
            yield

    def tell_of_waiting(self) -> None:
        """Warns where there is no room for a worker now, for which Ray waits without a word."""
        for _ in range(_PATIENCE):
            free = ray.available_resources()
            if self.fits(free):
                return
            time.sleep(1)
        _log.warning(
            "waiting for room in the Ray cluster: a worker takes %g processors and %g GPUs, free are %g and %g",
            self.cpus_per_worker,
            self.gpus_per_worker,
            free.get("CPU", 0.0),
            free.get("GPU", 0.0),
        )

    def close(self) -> None:
        """Leaves the session if it was entered here."""
        if self.own:
            ray.shutdown()


def connect(address: str | None, workers: int | None, gpus_per_worker: float | None) -> Cluster:
    """The session that there is, otherwise the cluster at `address`, otherwise one of this machine alone.

    `workers` None: one per GPU of the cluster (per `gpus_per_worker` of them), without GPUs one per machine.
    Raises ValueError if the address cannot be reached or the cluster has not the GPUs or processors asked for.
    """
    verbose = _log.isEnabledFor(logging.INFO)
    own = not ray.is_initialized()
    if own:
        start(address, verbose)
    elif address is not None:
        _log.warning("using the Ray session that this process already has, not %s", address)
    if not verbose:
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return share(nodes, workers, gpus_per_worker, own, verbose)
    except BaseException:
        if own:
            ray.shutdown()
        raise


def start(address: str | None, verbose: bool) -> None:
    """Joins the cluster at `address`, without one starts one. Raises ValueError if that cannot be done."""
    if address is not None and address.startswith("ray://"):
        raise ValueError(
            f"ray_address {address}: Ray Client is not supported; start this on a machine of the cluster and give "
            "auto, or HOST:PORT"
        )
    if address is not None and (found := re.fullmatch(r"\[?([^\]]+)\]?:([0-9]{1,5})", address)):
        try:  # Ray itself would try for a quarter of an hour
            socket.create_connection((found[1], int(found[2])), timeout=_CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ValueError(f"cannot reach a Ray cluster at {address!r}: {error}; {_UNREACHABLE}") from error
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")):
        os.environ.setdefault(name, value)
    level = logging.INFO if verbose else logging.ERROR
    options = {} if address else {"include_dashboard": False, "address": "local"}
    try:
        with _own_signals():
            ray.init(**{"address": address, "log_to_driver": verbose, "logging_level": level, **options})
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"cannot reach a Ray cluster at {address!r}: {reason}; {_UNREACHABLE}"
            if address
            else f"cannot start Ray on this machine: {reason}"
        ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray's handlers, which abort this process on SIGTERM, make room again for those that were there."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # None: not Python's, cannot be set
                    signal.signal(number, handler)


@contextmanager
def ray_errors_told() -> Iterator[None]:
    """What Ray raises of its own comes out as OSError, with the first and the last of its many lines."""
    try:
        yield
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise OSError(f"Ray has given up: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}") from error


def share(
    nodes: list[dict[str, float]], workers: int | None, gpus_per_worker: float | None, own: bool, verbose: bool
) -> Cluster:
    """What each worker gets of machines with these resources. Raises ValueError if there are not enough of them."""
    gpus = [node.get("GPU", 0.0) for node in nodes]
    cpus = [node.get("CPU", 0.0) for node in nodes]
    if gpus_per_worker is None:
        gpus_per_worker = 1.0 if sum(gpus) else 0.0
    if gpus_per_worker:
        fit = sum(int(count / gpus_per_worker) for count in gpus)
        if not fit:
            raise ValueError(f"no machine of the Ray cluster has {gpus_per_worker:g} GPUs; they have {_counts(gpus)}")
        if workers is not None and workers > fit:
            raise ValueError(
                f"{workers} workers with {gpus_per_worker:g} GPUs each: the Ray cluster has room for {fit}"
            )
        return Cluster(workers or fit, 0.0, float(gpus_per_worker), own, verbose)
    if not sum(cpus):
        raise ValueError("the Ray cluster has neither GPUs nor processors")
    count = workers or sum(1 for each in cpus if each >= 1)
    # Whole processors, as many as let every worker find its place.
    for each in range(int(max(cpus)), 0, -1):
        if sum(int(room) // each for room in cpus) >= count:
            return Cluster(count, float(each), 0.0, own, verbose)
    raise ValueError(f"{count} workers: the Ray cluster has {sum(cpus):g} processors ({_counts(cpus)} by machine)")


def check_versions(cluster: Cluster) -> None:
    """Raises ValueError naming the machines that have other versions of what both sides of a run use, or none."""

    # Inside, so that it travels by value: a machine without the package can run it, too.
    def versions(names: tuple[str, ...]) -> dict[str, str | None]:
        from importlib.metadata import PackageNotFoundError, version

        found: dict[str, str | None] = {}
        for name in names:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = None
        return found

    nodes = [node for node in ray.nodes() if node["Alive"] and cluster.fits(node["Resources"])]
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=True) for node in nodes]
    with ray_errors_told():
        there = ray.get([ray.remote(num_cpus=0, scheduling_strategy=at)(versions).remote(_SHARED) for at in places])
    own = package_versions(_SHARED)
    differing = [
        f"{node['NodeManagerAddress']} has {f'{name} {found[name]}' if found[name] else f'no {name}'}"
        for node, found in zip(nodes, there, strict=True)
        for name in _SHARED
        if found[name] != own[name]
    ]
    if differing:
        raise ValueError(
            f"{', '.join(differing)}; this process has "
            f"{', '.join(f'{name} {version}' for name, version in own.items())}: every machine needs the same"
        )


def _counts(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "none"
