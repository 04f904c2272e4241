"""From files to token batches: prompts, tasks, rows, encoding."""
