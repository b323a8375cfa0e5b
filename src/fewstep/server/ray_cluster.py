"""Ray: a cluster of this machine alone, or one that runs; how a model's replicas get onto it.

A cluster of its own listens on loopback only, and every call needs a token that is made anew for
each start: whoever may call Ray may run code.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, FewstepError, RequestError

OLDEST = (2, 60)  # replicas of older ones take calls, and with them code, without the token
STORE = 512 << 20  # bytes for pictures on their way; Ray would take 30% of the memory
HEALTH = 1.0  # seconds between two looks at each replica
ALONE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # everywhere: the machine's address is 127.0.0.1
    "RAY_USAGE_STATS_ENABLED": "0",
}
RAISED = re.compile(r"^[\w.]*?(\w+): (.*)", re.DOTALL)


@dataclass(frozen=True)
class Shares:
    """How many replicas there are, and what each has of a machine."""

    replicas: int
    device: str
    options: dict[str, float]  # in Ray's words
    threads: int | None = None  # of a CPU


class Cluster:
    """A connection to Ray, for one model.

    Raises RequestError if Ray is missing or too old, or if there is no cluster at `address`;
    None is one of this machine alone, which ends with the connection.
    """

    def __init__(self, address: str | None = None) -> None:
        if address is None:
            keep_to_itself()
        self.ray, self.serve = imported()
        self.name = f"fewstep-{secrets.token_hex(4)}"
        self.connects = not self.ray.is_initialized()
        self.is_own = self.connects and address is None
        self._is_open = True
        self._lock = threading.Lock()
        for noisy in ("ray", "ray.serve"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        if self.connects:
            self.connect(address)

    def connect(self, address: str | None) -> None:
        """Start a cluster, or join one."""
        more: dict[str, Any] = {"object_store_memory": STORE} if self.is_own else {}
        try:
            self.ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                **more,
            )
        except (OSError, RuntimeError, ValueError) as error:
            where = f"--ray-address {address}" if address else "--ray"
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RequestError(f"{where}: cannot be joined or started ({why})") from error

    def shares(self, device: str, replicas: int | None, threads: int | None) -> Shares:
        """What each replica gets. Raises RequestError for more than the cluster has."""
        machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return shares_of(machines, device, replicas, threads)

    def deploy(self, kind: type, arguments: tuple[Any, ...], shares: Shares, calls: int) -> Any:
        """A handle of replicas that are being started, each of which takes so many calls."""
        quiet = {"enable_access_log": False, "log_level": "ERROR"}
        self.serve.start(proxy_location="Disabled", logging_config=quiet)
        deployment = self.serve.deployment(
            name="replicas",
            num_replicas=shares.replicas,
            ray_actor_options=shares.options,
            max_ongoing_requests=calls,
            max_constructor_retry_count=shares.replicas,  # each may fail once at the start
            health_check_period_s=HEALTH,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=5.0,
            logging_config=quiet,
        )(kind)
        app = deployment.bind(*arguments)
        target = self.serve.RunTarget(app, name=self.name, route_prefix=None)
        return self.serve.run_many([target], wait_for_applications_running=False)[0]

    def ready(self) -> int:
        """How many replicas can draw. Raises what none of them could be started for."""
        app = self.serve.status().applications.get(self.name)
        if app is None:
            return 0
        if app.status == "DEPLOY_FAILED":
            raise failure_of("\n".join(each.message for each in app.deployments.values()))
        states = [each.replica_states for each in app.deployments.values()]
        return sum(each.get("RUNNING", 0) for each in states)

    def is_lost(self, error: Exception) -> bool:
        """Whether an error says that a replica is there no more."""
        return isinstance(error, self.ray.exceptions.RayActorError)

    def close(self) -> None:
        """End the replicas, a cluster of its own, and the connection."""
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            if not self.is_own:
                with suppress(Exception):  # the cluster may be gone
                    self.serve.delete(self.name)
            if self.connects:
                self.ray.shutdown()


def keep_to_itself() -> None:
    """Let a cluster that is started here be reached from here alone, and with a token.

    Ray reads this when it is imported. If it was before, a new cluster is as Ray makes it: with a
    token that it keeps at ~/.ray, on the machine's own address.
    """
    if "ray" in sys.modules:
        return
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def imported() -> tuple[Any, Any]:
    """Ray and Ray Serve. Raises RequestError where they are missing or too old."""
    remedy = "pip install 'fewstep[ray]', or leave --ray out"
    try:
        import ray
        from ray import serve
    except ImportError as error:
        missing = error.name or "a part of it"
        raise RequestError(f"--ray needs Ray, and {missing} is missing; {remedy}") from None
    if tuple(map(int, ray.__version__.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise RequestError(f"--ray needs Ray {oldest}, and this is {ray.__version__}; {remedy}")
    return ray, serve


def check_device(device: str) -> None:
    """Raises RequestError for a device that replicas cannot be asked to take."""
    if device not in ("auto", "cuda", "cpu"):
        raise RequestError(f"--device {device}: Ray chooses which; give auto, cuda or cpu")


def shares_of(
    machines: Sequence[Mapping[str, float]], device: str, replicas: int | None, threads: int | None
) -> Shares:
    """A GPU for each replica if there are any, else an even part of the CPUs.

    Raises RequestError for more replicas than the machines, told by their resources, have room for.
    """
    gpus = int(sum(machine.get("GPU", 0) for machine in machines))
    if device == "cuda" or (device == "auto" and gpus):
        count = replicas or max(1, gpus)
        check(count, gpus, "GPU")
        return Shares(count, "cuda:0", {"num_gpus": 1, "num_cpus": 1}, threads)
    cores = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
    count = replicas or max(1, len(cores))
    check(count, sum(cores), "CPU")
    # So many on each machine that all find room, whichever machine Ray takes first.
    cpus = next(n for n in range(max(cores), 0, -1) if sum(c // n for c in cores) >= count)
    return Shares(count, "cpu", {"num_cpus": cpus}, threads or cpus)


def check(count: int, there_are: int, kind: str) -> None:
    """Raises RequestError for more replicas than devices."""
    if count > there_are:
        raise RequestError(
            f"--replicas {count}: the cluster has {there_are} {kind}s; ask for at most so many, "
            "or join a larger one by --ray-address"
        )


def failure_of(message: str) -> FewstepError:
    """What a replica raised, as itself, from the text that Ray makes of it."""
    lines = [line for line in message.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("fewstep.errors.")]
    text = "\n".join(lines[starts[-1] :] if starts else lines[-1:])
    found = RAISED.match(text)
    if found is None:
        return CheckpointError(text or "the replicas could not be started")
    return (RequestError if found[1] == "RequestError" else CheckpointError)(found[2])
