"""Small programs to start from; each runs as it is."""
