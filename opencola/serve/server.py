"""The server around the application: it ends when it is told to, and not before what is begun is written."""

import os
import socket
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from opencola.errors import UserError
from opencola.serve.engine import Engine

KEEP_ALIVE = 30
"""Seconds that a connection may be idle."""


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, which nobody can connect to yet. Raises UserError where that cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        place = socket.socket(family, kind, proto)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind(address)
        except OSError:
            place.close()
            raise
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {host}, port {port}: {error}") from None
    return place


class Server(uvicorn.Server):
    """Serves an application and its engine, until a signal; at a second one it leaves at once."""

    def __init__(self, app: FastAPI, engine: Engine, ready: str = "") -> None:
        """ready: what to print when requests are answered."""
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            lifespan="off",
            ws="none",
        )
        super().__init__(config)
        self._engine, self._ready = engine, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As in uvicorn."""
        await super().startup(sockets)
        if self._ready:
            print(self._ready, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What waits is refused, what is begun is written to its end and sent."""
        closing = threading.Thread(target=self._engine.close, name="closing", daemon=True)
        closing.start()
        await super().shutdown(sockets)
        closing.join()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. uvicorn's own would be raised again in the end, and change the exit code."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
