"""Start every test process quickly.

The command line is imported first, so that Lightning leaves heavy packages out. Garbage collection pauses until all
tests are collected, because nearly every object that the imports create survives.
"""

import gc

gc.disable()

import launch.cli  # noqa: E402, F401


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
