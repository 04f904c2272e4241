"""Command groups, each: options -> one function -> one printed result."""
