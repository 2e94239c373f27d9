# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What the servers on 127.0.0.1 have in common: a queue for every client of a test, an address, and a thread."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any, Self


class LocalServer(ThreadingHTTPServer):
    """A server whose clients may hang up."""

    daemon_threads = True
    # With the library's 5, the kernel keeps a sixth client of the same moment waiting for a second, or resets it.
    request_queue_size = 128

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def start(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop listening; another server may take the port."""
        self.shutdown()
        self.server_close()

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Serve while the block runs."""
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong here; clients that gave up waiting are part of the tests."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
