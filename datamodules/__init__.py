"""Provide LightningDataModules, which load examples and form batches."""
