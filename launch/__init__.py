"""The search for each optimizer's settings: the same number of trials, the same points, the same rules."""
