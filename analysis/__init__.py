"""Read finished runs, compare them, and write the report.

``compare.py`` is the command. Nothing here imports torch.
"""
