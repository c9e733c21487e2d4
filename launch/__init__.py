"""Start runs from the command line, in sweeps, and within a time limit."""
