"""Studies: one question each, one script, one command, and what came of it under results/."""
