"""Import the command line first, so that Lightning leaves heavy packages out of every test process."""

import launch.cli  # noqa: F401
