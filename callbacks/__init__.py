"""Lightning callbacks: what a run records about itself."""
