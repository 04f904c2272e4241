"""What a run would cost, before it costs anything, and what this machine can do."""
