"""A run's folder: what is written into it, who may write, what it holds."""
