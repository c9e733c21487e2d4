"""LightningModules: a network, a loss and metrics each; the training step is theirs all."""
