"""The published protocol: prompts, tasks and their rows' text, quoted numbers."""
