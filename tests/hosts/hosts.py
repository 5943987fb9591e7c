"""Two machines on one: network namespaces with addresses, names and processes of their own.

A bridge joins them. They share the file system, as machines share a network drive. It takes root
and `ip`.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_NETWORK = "10.87.0"
_TAG = f"q{os.getpid() % 100_000}"
_NAMES = Path("/etc/netns")  # what `ip netns exec` puts over /etc


@dataclass(frozen=True, slots=True)
class Host:
    """A machine."""

    name: str
    address: str

    @property
    def namespace(self) -> str:
        return f"{_TAG}{self.name}"

    def start(self, *words: object, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command there; what it says is added to the file `log`."""
        named = ("unshare", "--uts", "sh", "-c", f'hostname {self.name}; exec "$@"', "sh")
        own = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *named, *map(str, words)],
                env=os.environ | own | environment,
                stdout=file,
                stderr=file,
            )

    def processes(self) -> dict[int, str]:
        """The processes of the machine, by number: their command lines."""
        found = {}
        for pid in map(int, _ip("netns", "pids", self.namespace).split()):
            with suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        return found

    def lose_power(self) -> None:
        """Kill every process at once, as far as that can be."""
        while running := self.processes():
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


@contextmanager
def inside(host: Host) -> Iterator[None]:
    """This thread, and the processes that it starts, have the network of a machine."""
    with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{host.namespace}") as there:
        _enter(there)
        try:
            yield
        finally:
            _enter(before)


def _enter(namespace: IO[str]) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
        raise OSError(ctypes.get_errno(), "setns")


def are_possible() -> bool:
    """Whether this user may make namespaces here."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    made = subprocess.run(["ip", "netns", "add", f"{_TAG}try"], capture_output=True)
    subprocess.run(["ip", "netns", "del", f"{_TAG}try"], capture_output=True)
    return made.returncode == 0


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two machines, whose processes end with the block."""
    hosts = Host("alpha", f"{_NETWORK}.1"), Host("beta", f"{_NETWORK}.2")
    bridge = f"{_TAG}br"
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for host in hosts:
            _join(host, bridge, hosts)
        yield hosts
    finally:
        for host in hosts:
            with suppress(RuntimeError):
                host.lose_power()
                _ip("netns", "del", host.namespace)
            shutil.rmtree(_NAMES / host.namespace, ignore_errors=True)
        with suppress(RuntimeError):
            _ip("link", "del", bridge)


def _join(host: Host, bridge: str, hosts: tuple[Host, ...]) -> None:
    """Make a machine and connect it to the bridge."""
    (_NAMES / host.namespace).mkdir(parents=True)
    known = "".join(f"{each.address} {each.name}\n" for each in hosts)
    (_NAMES / host.namespace / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
    space, outer = host.namespace, f"{_TAG}{host.address[-1]}"
    _ip("netns", "add", space)
    _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
    _ip("link", "set", outer, "master", bridge, "up")
    _ip("-n", space, "addr", "add", f"{host.address}/24", "dev", "eth0")
    _ip("-n", space, "link", "set", "eth0", "up")
    _ip("-n", space, "link", "set", "lo", "up")


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def wait_until(is_so: Callable[[], bool], seconds: float = 240) -> None:
    """Wait until something is so, or raise TimeoutError."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)
