"""What is asked for: every key, read from YAML; what is wrong, and on which line."""
