"""Two hosts and what they are to each other, as lines of JSON; then they wait for ever. See `test_hosts.py`."""

import json
import socket
import subprocess
import sys
import time
from typing import Any

from tests.netns.hosts import FILES, Host, is_alive, make_switch

_SERVER = """
import socket
listening = socket.create_server(("", 7000))
print("listening", flush=True)
while True:
    connection, _ = listening.accept()
    connection.sendall(socket.gethostname().encode())
    connection.close()
"""
_ASK = "import socket, sys; print(socket.create_connection((sys.argv[1], 7000), timeout=1).recv(100).decode())"


def main() -> None:
    make_switch()
    known = ["one=10.77.0.1", "two=10.77.0.2"]
    one, two = Host("one", 1, known), Host("two", 2, known)
    for host in (one, two):
        host.start()
    server = one.run([sys.executable, "-c", _SERVER], {}, stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()
    say("names", [ask(two, "one"), _asked_here(one.address)])
    (FILES / "of-the-switch").touch()
    subprocess.run(one.inside(["touch", f"{FILES}/of-one"]), check=True)
    say("files", [files(host) for host in (one, two)])
    one.cut()
    say("while cut off", ask(two, "one"))
    say("goes on", is_alive(server.pid))
    one.mend()
    say("connected again", _until_answered(two))
    running = one.processes()
    say("running", len(running))
    one.kill()
    say("left of a killed host", [command for pid, command in running.items() if is_alive(pid)])
    one.start()
    say("started again", len(one.processes()))
    say("done", True)
    time.sleep(1000)


def say(what: str, value: Any) -> None:
    print(json.dumps([what, value]), flush=True)


def files(host: Host) -> list[str]:
    """Of its own, but those that any host has."""
    listed = subprocess.run(host.inside(["ls", str(FILES)]), capture_output=True, text=True, check=True)
    return sorted(set(listed.stdout.split()) - {"hosts", "resolv.conf"})


def ask(host: Host, whom: str) -> str:
    """What it is answered; empty if nobody answers."""
    asked = subprocess.run(host.inside([sys.executable, "-c", _ASK, whom]), capture_output=True, text=True, check=False)
    return asked.stdout.strip()


def _asked_here(address: str) -> str:
    with socket.create_connection((address, 7000), timeout=1) as connection:
        return connection.recv(100).decode()


def _until_answered(host: Host) -> str:
    deadline = time.monotonic() + 10
    while not (answer := ask(host, "one")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return answer


if __name__ == "__main__":
    main()
