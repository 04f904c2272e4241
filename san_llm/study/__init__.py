"""A study: one recipe's variants trained over seeds, each at its own best rate, and compared."""
