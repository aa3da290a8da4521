"""Waiting for what must become true."""

import time

from .env import SLOWNESS


def eventually(condition, seconds=60.0, what=None):
    """Calls condition until it returns something true, which is returned; fails after seconds: it never came true. How
    soon it does is for scripts/bench to say, and no test fails because the machine is slow.

    An AssertionError or OSError of the condition counts as not yet.
    """
    deadline = time.monotonic() + seconds * SLOWNESS
    last = None
    while True:
        try:
            result = condition()
            if result:
                return result
            last = None
        except (AssertionError, OSError) as error:
            last = error
        if time.monotonic() > deadline:
            name = what or getattr(condition, "__name__", "condition")
            suffix = f": {last!r}" if last is not None else ""
            raise AssertionError(f"{name} not true within {seconds * SLOWNESS:g} s{suffix}")
        time.sleep(0.02)
