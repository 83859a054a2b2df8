"""Graceful shutdown: SIGINT and SIGTERM stop training at the end of the current step."""

import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, MappingProxyType
from typing import Any

log = logging.getLogger("relaylab.train")

AT_ONCE_AFTER_S = 2.0  # torchrun forwards Ctrl-C immediately, which is not a second request


class StopRequest:
    """A flag that is true once a stop has been requested; `signal` is the name of the signal."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._since = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None

    def receive(self, signum: int, _frame: FrameType | None = None) -> None:
        """Handle a signal. A second Ctrl-C, at least two seconds after the first, interrupts immediately.

        Raises:
            KeyboardInterrupt: at the second Ctrl-C.
        """
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = signal.Signals(signum).name, now
            log.info("%s: stopping after the current step, which is saved", self.signal)
        elif signum == signal.SIGINT and now - self._since > AT_ONCE_AFTER_S:
            raise KeyboardInterrupt


@contextmanager
def stopping() -> Iterator[StopRequest]:
    """Treat SIGINT and SIGTERM as requests to stop, in a process that trains.

    When a data-loading worker dies, PyTorch's SIGCHLD handler raises an error at once, possibly in the middle of an
    update. Without the handler, the error is raised when the next batch is fetched.
    """
    from torch.utils.data._utils import signal_handling

    if threading.current_thread() is threading.main_thread():
        signal_handling._set_SIGCHLD_handler()  # PyTorch does this once, and not again  # pyright: ignore
    with receiving({signal.SIGCHLD: signal.SIG_DFL}) as request:
        yield request


@contextmanager
def receiving(others: Mapping[int, Any] = MappingProxyType({})) -> Iterator[StopRequest]:
    """Treat SIGINT and SIGTERM as requests to stop; `others` are handlers of other signals."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may set handlers
        return
    handlers: dict[int, Any] = {signal.SIGINT: request.receive, signal.SIGTERM: request.receive, **others}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
