"""A real Redis cluster for the tests: nodes without replicas, each with its part of the slots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis
from redis.crc import key_slot

from service.queue.keys import PREFIX
from tests.service.helpers import wait_until
from tests.service.redis_server import RedisServer

NODES = 3
SLOTS = 16384
PASSWORD = "p@ss"
# The slot of everything that the queue keeps.
QUEUE_SLOT = key_slot(PREFIX.encode())


class RedisCluster:
    """Nodes that know each other."""

    def __init__(self, nodes: list[RedisServer]) -> None:
        self.nodes = nodes

    @property
    def url(self) -> str:
        """The address of one node, which is not the one that the queue lies on."""
        node = next(node for node in self.nodes if node is not self.owner)
        return f"redis+cluster://:p%40ss@127.0.0.1:{node.port}"

    @property
    def owner(self) -> RedisServer:
        """The node that the queue lies on."""
        return next(node for node in self.nodes if _owns(node, QUEUE_SLOT))

    def redirections(self) -> int:
        """How often clients asked the wrong node."""
        return sum(map(_redirections, self.nodes))

    def clear(self) -> None:
        """Forget every key."""
        for node in self.nodes:
            with node.client() as client:
                client.flushall()

    def begin_move(self) -> RedisServer:
        """Have the slot of the queue leave its node: what is not there is asked for at the node that is returned."""
        old = self.owner
        new = next(node for node in self.nodes if node is not old)
        with old.client() as leaving, new.client() as entering:
            entering.execute_command("CLUSTER SETSLOT", QUEUE_SLOT, "IMPORTING", _id(leaving))
            leaving.execute_command("CLUSTER SETSLOT", QUEUE_SLOT, "MIGRATING", _id(entering))
        return new

    def end_move(self, new: RedisServer) -> None:
        """Move what there is, and make the new node the owner."""
        old = self.owner
        with old.client() as leaving, new.client() as entering:
            names = leaving.execute_command("CLUSTER GETKEYSINSLOT", QUEUE_SLOT, 1000)
            if names:
                leaving.execute_command("MIGRATE", "127.0.0.1", new.port, "", 0, 5000, "AUTH", PASSWORD, "KEYS", *names)
            name = _id(entering)
            for client in (entering, leaving):
                client.execute_command("CLUSTER SETSLOT", QUEUE_SLOT, "NODE", name)


@contextmanager
def redis_cluster(binary: str, folder: Path) -> Iterator[RedisCluster]:
    """A cluster that answers, with a password."""
    with ExitStack() as stack:
        nodes = [stack.enter_context(_node(binary, folder, place)) for place in range(NODES)]
        for place, node in enumerate(nodes):
            with node.client() as client:
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", place + 1)
                slots = range(place * SLOTS // NODES, (place + 1) * SLOTS // NODES)
                client.execute_command("CLUSTER ADDSLOTS", *slots)
                if place > 0:
                    client.execute_command("CLUSTER MEET", "127.0.0.1", nodes[0].port)
        wait_until(lambda: all(map(_complete, nodes)))
        yield RedisCluster(nodes)


def _node(binary: str, folder: Path, place: int) -> RedisServer:
    files = ("--cluster-config-file", f"nodes-{place}.conf")
    access = ("--requirepass", PASSWORD, "--masterauth", PASSWORD)
    return RedisServer(binary, folder, "--cluster-enabled", "yes", *files, *access, password=PASSWORD)


def _complete(node: RedisServer) -> bool:
    with node.client() as client:
        info = client.cluster("info")
        return bool(info["cluster_state"] == "ok" and info["cluster_known_nodes"] == f"{NODES}")


def _redirections(node: RedisServer) -> int:
    with node.client() as client:
        found = client.info("errorstats").get("errorstat_MOVED", {"count": 0})
        return int(found["count"])


def _owns(node: RedisServer, slot: int) -> bool:
    with node.client() as client:
        mine = _id(client)
        ranges = client.execute_command("CLUSTER SLOTS")
        return any(first <= slot <= last and _text(master[2]) == mine for first, last, master, *_ in ranges)


def _id(client: redis.Redis) -> str:
    return _text(client.execute_command("CLUSTER MYID"))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
