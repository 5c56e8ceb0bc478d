"""What tasks of the tests do, in a module that imports little: processes take the place of others."""

import os
import signal
import time


def square(i):
    return i * i


def unlucky(i):
    if i == 3:
        raise ValueError(f"no luck with {i}")
    return i


def slow(seconds):
    time.sleep(seconds)
    return seconds


def dies(i):
    os.kill(os.getpid(), signal.SIGKILL)


class Suicidal:
    def __init__(self, folder):
        self.folder = folder

    def __call__(self, i):
        mark = self.folder / str(i)
        if not mark.exists():
            mark.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return i
