"""An `os` whose calls fail, stop halfway or kill the process, as full disks, bad ones and a `kill -9` do to a save."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Any

WATCHED = ("open", "write", "fsync", "close", "replace", "rename", "link", "truncate", "ftruncate", "unlink")
ERRORS = {
    "full disk": errno.ENOSPC,
    "bad disk": errno.EIO,
    "full disk, half a write": errno.ENOSPC,
    "bad disk from then on": errno.EIO,
}
SHORT = "short writes"  # no error at all
KILLS = ("killed before", "killed in", "killed after")


class FaultyOs:
    """Stands for the module `os` in a module that saves. `kind` happens at watched call number `at`, from 0 on.

    calls: the watched calls so far, by name. happened: the fault did.
    """

    def __init__(self, kind: str = "", at: int = -1):
        self.kind, self.at = kind, at
        self.calls: list[str] = []
        self.happened = False
        self.fails_next = False

    def __getattr__(self, name: str) -> Any:
        call = getattr(os, name)
        return self._watched(name, call) if name in WATCHED else call

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            number = len(self.calls)
            self.calls.append(name)
            if self.kind == SHORT and name == "write":
                self.happened = True
                return call(arguments[0], bytes(arguments[1][:7]))
            if self.kind != SHORT and (number == self.at or self.fails_next):
                self.happened = True
                return self._faulty(name, call, arguments, options)
            return call(*arguments, **options)

        return watched

    def _faulty(self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        half = name == "write" and self.kind in ("full disk, half a write", "killed in") and not self.fails_next
        if half:
            written = call(arguments[0], bytes(arguments[1][: len(arguments[1]) // 2]))
        if self.kind in KILLS:
            if self.kind == "killed after":
                call(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        self.fails_next = half or self.kind == "bad disk from then on"
        if half:
            return written
        if name == "close":
            call(*arguments)  # it is gone either way
        raise OSError(ERRORS[self.kind], os.strerror(ERRORS[self.kind]))
