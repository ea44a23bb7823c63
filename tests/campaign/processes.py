"""Work in a forked child: all imports are there already, and it may be killed."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def fork(work: Callable[[], int], log: Path) -> int:
    """Starts `work` in a child whose exit code is what it returns and whose output goes to `log`. Returns its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = work()
    except BaseException:
        log.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def exit_code(child: int, seconds: float = 900) -> int:
    """Waits for the child; minus the signal if one ended it. A child that takes longer is killed: TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise TimeoutError(f"no end within {seconds:.0f} s")
