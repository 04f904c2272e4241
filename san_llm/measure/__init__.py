"""The propagation graph of any model, found by moving channels of a small random copy."""
