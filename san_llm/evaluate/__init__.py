"""From a model and tasks to scores: generate, score, report."""
