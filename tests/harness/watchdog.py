"""A hard limit on every test.

A thread that waits for a FUSE reply cannot be woken by an ordinary signal, so a plain alarm would
not end a stuck test. The watchdog aborts the connections and kills the daemons of the test first,
which fails the system call, and then raises in the thread that runs the tests.
"""

import ctypes
import faulthandler
import os
import signal
import sys
import threading

GRACE = 20  # seconds for a test to end after its mounts were aborted; then the whole run ends


class TestTimeout(Exception):
    """The test took longer than its limit."""


class Watchdog:
    def __init__(self):
        self._lock = threading.Lock()
        self._clusters = []
        self._timers = []
        self._limit = 0
        self._armed = False
        self.barked = False
        # The tests' thread is the main one, except in a worker of pytest-xdist on Debian 12 now and
        # then. Only the main thread handles signals, which also wake it from a system call.
        self._thread = threading.current_thread()
        self._signals = self._thread is threading.main_thread()
        if self._signals:
            signal.signal(signal.SIGALRM, self._raise)

    def watch(self, cluster):
        with self._lock:
            self._clusters.append(cluster)

    def unwatch(self, cluster):
        with self._lock:
            self._clusters.remove(cluster)

    def arm(self, seconds):
        self._limit = seconds
        self._armed = True
        self.barked = False
        for delay, action in ((seconds, self._bark), (seconds + GRACE, self._bite)):
            timer = threading.Timer(delay, action)
            timer.daemon = True
            timer.start()
            self._timers.append(timer)

    def disarm(self):
        self._armed = False
        for timer in self._timers:
            timer.cancel()
        self._timers = []

    def _bark(self):
        self.barked = True
        print(f"\nwatchdog: {self._limit:g} s are over, aborting the mounts", file=sys.__stderr__)
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        with self._lock:
            for cluster in self._clusters:
                cluster.abort()
        if self._signals:
            signal.pthread_kill(self._thread.ident, signal.SIGALRM)
        elif self._armed:
            thread = ctypes.c_ulong(self._thread.ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TestTimeout))

    def _bite(self):
        print("\nwatchdog: the test does not end, giving up the run", file=sys.__stderr__)
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        os._exit(70)  # the mounts and daemons go with this process: see env.py

    def _raise(self, _signal, _frame):
        if self._armed:
            raise TestTimeout(f"the test took longer than {self._limit:g} s")
