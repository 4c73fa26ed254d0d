"""Servers and clients in threads of the test's own process, and connections that behave badly."""

from __future__ import annotations

import socket
import threading

import numpy as np

from isotone.sketching import wire
from isotone.sketching.client import ClientConfig, run_client
from isotone.sketching.exchange import read_exactly
from isotone.sketching.server import ServerConfig, serve
from isotone.sketching.wire import HEADER, Message


class Task(threading.Thread):
    """A function in a thread; `result()` gives what it returned, or raises what it raised."""

    def __init__(self, function, *args, **options):
        super().__init__(daemon=True)
        self.call = lambda: function(*args, **options)
        self.value = self.error = None
        self.start()

    def run(self):
        try:
            self.value = self.call()
        except BaseException as error:
            self.error = error

    def result(self, timeout=60):
        self.join(timeout)
        assert not self.is_alive(), "it did not end in time"
        if self.error is not None:
            raise self.error
        return self.value


def server(plan, folder, **options):
    """A server in a thread, and its port."""
    ready, ports = threading.Event(), []

    def told(port):
        ports.append(port)
        ready.set()

    extra = {name: options.pop(name) for name in ("resume", "round_done") if name in options}
    task = Task(serve, plan, folder, ServerConfig(**options), ready=told, **extra)
    while not ready.wait(0.05):
        if not task.is_alive():
            task.result()
    return task, ports[0]


def client(number, port, folder, **options):
    """A client in a thread."""
    extra = {name: options.pop(name) for name in ("resume", "advanced") if name in options}
    return Task(run_client, ClientConfig(number, port=port, **options), folder / f"client-{number}", **extra)


class Line:
    """A connection, to a port or made already, that says what the test wants."""

    def __init__(self, end):
        self.socket = end if isinstance(end, socket.socket) else socket.create_connection(("127.0.0.1", end), 20)

    def hello(self, number, have=0):
        self.say(wire.encode(Message("hello", round=have, client=number)))
        return self.hear()

    def say(self, data):
        self.socket.sendall(data)

    def hear(self):
        """The next message; None where the server has closed."""
        try:
            header = read_exactly(self.socket, HEADER)
            if not header:
                return None
            length = wire.payload_length(header)
            return wire.decode(header + (read_exactly(self.socket, length) if length else b""))
        except ConnectionError:
            return None

    def close(self):
        self.socket.close()


# --- processes of Flower's; flwr is not always installed ---------------------------------------------------------


def flower_server(config, address, path):
    """Serve a config to its end; the means of its rounds, and the accuracy, go to a file."""
    from isotone.sketching import flower

    strategy = flower.SketchedFedAvg(flower.clients_of(config)[0].s, config.rounds, config.clients)
    flower.serve(strategy, address)
    np.savez(path, means=np.stack(strategy.means.history), accuracy=strategy.accuracy)


def flower_client(config, address, number):
    """One client, until the server is through."""
    from isotone.sketching import flower

    flower.join(flower.clients_of(config)[1](number, None), address)
