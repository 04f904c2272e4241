"""Rows of people: read, split, tokenized, padded or packed into batches."""
