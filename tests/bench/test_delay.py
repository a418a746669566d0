"""The delaying proxy of the benchmarks: what it says of a link is true, or its figures would mean nothing."""

import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.bench.delay import Traffic, link

RTT = 80
"""Milliseconds."""

SECONDS = 30


@pytest.fixture
def echo():
    """The port of a server that sends back what it gets, and its end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection):
            with connection:
                while data := connection.recv(65536):
                    connection.sendall(data)

        def accept():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def connect(port):
    """A connection that does not wait for ever."""
    return socket.create_connection(("127.0.0.1", port), SECONDS)


def receive(connection, size):
    """As many bytes."""
    data = b""
    while len(data) < size:
        piece = connection.recv(65536)
        assert piece, "the connection ended early"
        data += piece
    return data


def exchange(port, sent):
    """Send something in odd pieces, end, and receive until the end."""
    received = []
    with connect(port) as connection:

        def read():
            while data := connection.recv(65536):
                received.append(data)

        reader = threading.Thread(target=read)
        reader.start()
        chance = random.Random(len(sent))
        start = 0
        while start < len(sent):
            size = chance.choice([1, 100, 5000, 300_000])
            connection.sendall(sent[start : start + size])
            start += size
        connection.shutdown(socket.SHUT_WR)
        reader.join(SECONDS)
    return b"".join(received)


def test_delay(echo):
    """An answer takes a whole round trip, each time, and the first one also that of the connection."""
    with link(echo, RTT) as slow:
        started = time.monotonic()
        with connect(slow.port) as connection:
            for number in range(5):
                connection.sendall(b"x")
                receive(connection, 1)
                took = (time.monotonic() - started) * 1000
                assert took >= RTT * (number + 2)


def test_noWaitingBetween(echo):
    """What is sent piece by piece without waiting for answers takes one round trip altogether, not one for each."""
    count = 50
    with link(echo, RTT) as slow, connect(slow.port) as connection:
        started = time.monotonic()
        for _ in range(count):
            connection.sendall(b"x")
            time.sleep(0.001)
        receive(connection, count)
        took = (time.monotonic() - started) * 1000
    assert RTT <= took < RTT * count / 4


@pytest.mark.parametrize("rtt", [0, 5])
def test_intact(echo, rtt):
    """Under load, over several connections at once, every byte arrives, in order, then the end; and is counted."""
    chance = random.Random(rtt)
    sent = [chance.randbytes(size) for size in (8_000_000, 3_000_001, 17, 0)]
    with link(echo, rtt) as slow:
        before = slow.traffic
        with ThreadPoolExecutor(len(sent)) as threads:
            received = list(threads.map(lambda data: exchange(slow.port, data), sent))
        assert [len(data) for data in received] == [len(data) for data in sent]
        assert received == sent
        total = sum(map(len, sent))
        assert slow.traffic.since(before) == Traffic(len(sent), total, total)


def test_noServer():
    """Where nobody listens, a connection ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = listener.getsockname()[1]
    with link(nobody) as slow, connect(slow.port) as connection:
        assert connection.recv(1) == b""
