"""The parts of benchmarks/gpu.py, one module each."""

# Prefix of the lines of a part's output that are numbers in JSON.
NUMBER = "@number "
# Exit code of a part that has written why it failed.
FAILED = 10
