"""Scripts that answer one question each, with their outcome under results/."""
