"""What is typed: one file a command, of options and printed results; no decisions."""
