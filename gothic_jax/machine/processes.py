"""The processes of a run on several machines: they agree on numbers, and end together.

JAX's distributed runtime joins them. What they must decide alike goes through its collectives;
a connection from each to the first process tells at once who has ended, and why.
"""

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gothic_jax.errors import UserError
from gothic_jax.machine.hosts import Place

LOST_AFTER = 20
"""Seconds without a sign of life after which a process is lost, where its host has vanished."""
LOST = 1
"""Exit code of a process whose run has lost another one."""
_DEVICES = "JAX_LOCAL_DEVICE_IDS"
ARRIVAL = 300
"""Seconds in which all processes must come."""
_PATIENCE = 5
"""Seconds in which the reason arrives why a collective broke off."""


class Team:
    """This process among those of its run; the only one, unless `join` made it."""

    def __init__(self, count: int = 1, index: int = 0) -> None:
        self.count = count
        self.index = index
        self._told: Callable[[], list[int]] | None = None
        self._watch: _Watch | None = None

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.index == 0

    def post(self, *values: int) -> Callable[[], list[int]]:
        """Starts to compare; what it gives waits for the largest of each value at any process.

        As all collectives: every process calls it at the same place of the program.
        """
        if self.count == 1:
            return lambda: [*map(int, values)]
        rows, largest = self._comparison
        own = np.tile(np.array(values, np.int32), (jax.local_device_count(), 1))
        result = largest(jax.make_array_from_process_local_data(rows, own))
        return lambda: [*map(int, np.asarray(result))]

    def agree(self, *values: int) -> list[int]:
        """The largest of each value at any process; waits for all of them."""
        return self.post(*values)()

    def told(self, *values: int) -> list[int]:
        """As `agree`, but of the values passed at the call before, so that nobody waits.

        With one process, of these. The first call, and the one after `settle`, waits.
        """
        new = self.post(*values)
        old, self._told = self._told if self.count > 1 and self._told else new, new
        return old()

    def settle(self) -> None:
        """Lets the next `told` forget what was passed before."""
        self._told = None

    def same(self, content: str) -> bool:
        """Whether all processes call it with the same text."""
        number = zlib.crc32(content.encode()) & 0x7FFFFFFF
        largest, negated_smallest = self.agree(number, -number)
        return largest == -negated_smallest

    def own(self, tree: Any) -> Any:
        """Whole arrays that this process can use by itself; every process calls it.

        What is divided over devices is gathered, array by array, on the first of each process.
        """

        if self.count == 1 and all(leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
            return tree

        def whole(leaf: jax.Array) -> jax.Array:
            if not leaf.is_fully_replicated:
                everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
                leaf = jax.jit(_unchanged, out_shardings=everywhere)(leaf)
            return leaf.addressable_data(0)

        return jax.tree.map(whole, tree)

    @contextlib.contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The first process goes through the block before the others, which say nothing there."""
        if self.is_first:
            yield
            self.agree(0)
            return
        self.agree(0)
        with Path(os.devnull).open("w") as null, contextlib.redirect_stderr(null):
            yield

    @contextlib.contextmanager
    def ending_together(self, *, parting: bool = True) -> Iterator[None]:
        """A process that fails in the block ends all. At its end all wait for each other, and with
        `parting` part."""
        if self._watch is None:
            yield
            return
        try:
            yield
        except UserError as error:
            self._watch.end_all(str(error), 2)
        except jax.errors.JaxRuntimeError as error:
            # Another process has broken off a collective: the watch soon says which, and ends us.
            time.sleep(_PATIENCE)
            traceback.print_exc()
            self._watch.end_all(f"JAX failed: {error}", LOST)
        except BaseException:
            traceback.print_exc()
            self._watch.end_all("a bug; its traceback is in this process's output", LOST)
        self.agree(0)
        if not parting:
            return
        self._watch.close()
        jax.distributed.shutdown()

    @functools.cached_property
    def _comparison(self) -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
        mesh = Mesh(np.array(jax.devices()), ("device",))
        everywhere = NamedSharding(mesh, PartitionSpec())
        largest = jax.jit(lambda rows: rows.max(axis=0), out_shardings=everywhere)
        return NamedSharding(mesh, PartitionSpec("device")), largest

    @classmethod
    def join(cls, place: Place, program: str) -> "Team":
        """Joins the other processes of the run; raises UserError where they do not come.

        The others' stdout is closed: what they would print is what the first one prints.
        """
        watch = _Watch(place, program)
        team = cls(place.count, place.index)
        team._watch = watch
        # JAX would take SIGTERM for itself.
        jax.config.update("jax_enable_preemption_service", False)
        # On a CPU, the only collectives between processes that every build of JAX has.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize(
                watch.coordinator,
                place.count,
                place.index,
                # JAX's variable, or else None for all devices of the host.
                local_device_ids=None if _DEVICES in os.environ else place.device,
                cluster_detection_method="deactivate",  # `find_place` has done it
                heartbeat_timeout_seconds=LOST_AFTER,
            )
        except (RuntimeError, ValueError) as error:
            watch.end_all(f"JAX cannot join the processes: {error}", LOST)
        with _silent_stdout(for_good=not team.is_first), team.ending_together(parting=False):
            pass  # the first collective: Gloo prints that it has connected them
        return team


def _unchanged(array: jax.Array) -> jax.Array:
    return array


ALONE = Team()


class _Watch:
    """Connections between the first process and each of the others.

    They bring the processes together, before JAX, which ends with a dump of its stack where one
    does not come. Then nothing passes over them until a process ends: its reason, or nothing if it
    was killed.
    """

    def __init__(self, place: Place, program: str) -> None:
        self._count, self._index = place.count, place.index
        self._program = program
        self._closed = False
        self._lock = threading.Lock()
        host, _, port = place.coordinator.rpartition(":")
        if place.index == 0:
            self._peers = _all_arrived(int(port), place.count)
            with socket.create_server(("", 0)) as free:
                own_port = free.getsockname()[1]
            for peer, _ in self._peers.values():
                peer.sendall(_line({"port": own_port}))
        else:
            peer, own_port = _arrive(host.strip("[]"), int(port), place)
            self._peers = {0: (peer, host)}
        self.coordinator = f"{host}:{own_port}"
        """Where JAX's runtime is to join them."""
        for index, (peer, name) in self._peers.items():
            _keep_alive(peer)
            threading.Thread(target=self._await, args=(index, peer, name), daemon=True).start()

    def end_all(self, reason: str, code: int) -> NoReturn:
        """Ends this process with the reason on stderr, and the others with the same code."""
        self._end(reason, f"process {self._index}: {reason}", code)

    def close(self) -> None:
        """Lets the processes end one by one: all have come to the end of the run."""
        self._closed = True

    def _await(self, index: int, peer: socket.socket, host: str) -> None:
        """Waits for the end of another process, and ends this one with it."""
        try:
            content = b"".join(iter(lambda: peer.recv(4096), b""))
        except OSError:  # its host has vanished
            content = b""
        if self._closed:
            return
        try:
            last = json.loads(content)
            reason, code = str(last["reason"]), int(last["code"])
        except (ValueError, TypeError, KeyError):
            code = LOST
            reason = (
                f"process {index} of {self._count} on {host} was killed, or its machine was lost;"
                " start all processes again with --resume, which goes on from the last checkpoint"
            )
        self._end(reason, reason, code)

    def _end(self, own: str, others: str, code: int) -> NoReturn:
        with self._lock:  # held for good: only the first reason counts
            told = _line({"reason": others, "code": code})
            for peer, _ in self._peers.values():
                with contextlib.suppress(OSError):  # it may be the one that is lost
                    peer.sendall(told)
                    peer.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            with contextlib.suppress(OSError):
                os.write(2, f"{self._program}: error: {' '.join(own.split())}\n".encode())
            # JAX's own end would wait for processes that will not come.
            os._exit(code)


def _all_arrived(port: int, count: int) -> dict[int, tuple[socket.socket, str]]:
    """Connections from all other processes, by index, with their hosts. Raises UserError."""
    peers: dict[int, tuple[socket.socket, str]] = {}
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"the first process cannot await the others at port {port}:"
            f" {os.strerror(error.errno or 0)}; name another port, for all of them"
        ) from error
    until = time.monotonic() + ARRIVAL
    with server:
        while len(peers) < count - 1:
            server.settimeout(max(until - time.monotonic(), 0.001))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                missing = sorted({*range(1, count)} - peers.keys())
                raise UserError(
                    f"of {count} processes, {', '.join(map(str, missing))} did not come to port"
                    f" {port} within {ARRIVAL} s; start all with the same address, which must be"
                    " one of this host that the others reach"
                ) from None
            peer.settimeout(_PATIENCE)
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                hello = json.loads(_read_line(peer))
                index, host = int(hello["index"]), str(hello["host"])
                if hello["count"] == count and 0 < index < count and index not in peers:
                    peers[index] = (peer, host)
                    continue
            peer.close()  # a stranger, or one too many
    return peers


def _arrive(host: str, port: int, place: Place) -> tuple[socket.socket, int]:
    """A connection to the first process, and the port at which JAX joins all of them."""
    until = time.monotonic() + ARRIVAL
    while True:
        left = max(until - time.monotonic(), 0.001)
        try:
            peer = socket.create_connection((host, port), timeout=left)
            break
        except OSError as error:  # it is not there yet
            if time.monotonic() > until - 1:
                raise UserError(
                    f"process {place.index} of {place.count} does not reach the first one at"
                    f" {host}:{port} ({error.strerror or error}); start all with the same address,"
                    " which must be one of the first one's host"
                ) from error
            time.sleep(1)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        hello = {"index": place.index, "count": place.count, "host": socket.gethostname()}
        peer.sendall(_line(hello))
        return peer, int(json.loads(_read_line(peer))["port"])
    raise UserError(
        f"process {place.index} of {place.count} was not taken by the first one at {host}:{port}:"
        " not all came, or two have the same index, or they disagree about how many they are"
    )


def _read_line(peer: socket.socket) -> bytes:
    """A short line, byte by byte: nothing behind it is taken."""
    content = b""
    while not content.endswith(b"\n") and len(content) < 1024:
        if not (byte := peer.recv(1)):
            break
        content += byte
    return content


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _keep_alive(peer: socket.socket) -> None:
    """Lets the kernel give up a connection whose other host has vanished, after LOST_AFTER."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LOST_AFTER // 4)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LOST_AFTER // 4)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


@contextlib.contextmanager
def _silent_stdout(*, for_good: bool) -> Iterator[None]:
    """Points stdout at os.devnull within the block, or for good: Gloo prints each connection."""
    sys.stdout.flush()
    kept = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    yield
    if not for_good:
        os.dup2(kept, 1)
    os.close(kept)
