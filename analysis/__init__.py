"""Finished runs put side by side: reading them, the statistics, and the report. ``compare.py`` is the command."""
