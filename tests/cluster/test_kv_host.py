"""KV hosts of two nodes, as Ray runs them: what one has, the other gets."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.kv.wire import ELSEWHERE, Found
from tests.cluster.kv.talk import Client, chain, connected

ROOT = Path(__file__).parents[2]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def sockets() -> Iterator[list[Path]]:
    with tempfile.TemporaryDirectory(prefix="mk-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        command = [sys.executable, "-m", "tests.cluster.two_nodes", directory]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                line = next((line for line in process.stdout if line.endswith("kv.sock\n")), "")
                paths = [Path(path) for path in line.split()]
                assert len(set(paths)) == 2, "the nodes did not start"
                yield paths
            finally:
                process.stdin.close()
                process.wait(60)
        assert not any(path.exists() for path in paths), "a host did not end"


async def found_elsewhere(client: Client, *names: str) -> Found:
    """What a host finds once another one has the time to answer it: it does not wait for a busy one."""
    for _ in range(20):
        found = await client.find(*names)
        if found.slots:
            break
        await client.release(found.ticket)
    return found


@pytest.mark.anyio
async def test_pages_cross_from_node_to_node(sockets: list[Path]) -> None:
    names = chain("a", 20)
    async with connected(sockets[0]) as one:
        await one.put(*names)
    async with connected(sockets[1]) as two:
        found = await found_elsewhere(two, *names, "unknown")
        assert found.slots == [ELSEWHERE] * 20
        slots, crcs = await two.fetch(found, 20)
        two.check(slots, crcs, *names)
        await two.release(found.ticket)
        assert all(slot >= 0 for slot in (await two.find(*names)).slots), "they are on this node now"


@pytest.mark.anyio
async def test_they_cross_the_other_way_too(sockets: list[Path]) -> None:
    async with connected(sockets[1]) as two:
        await two.put("b")
    async with connected(sockets[0]) as one:
        found = await found_elsewhere(one, "b")
        one.check(*(await one.fetch(found, 1)), "b")
