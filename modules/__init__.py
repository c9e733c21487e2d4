"""Define LightningModules, each with a network, a loss and metrics."""
