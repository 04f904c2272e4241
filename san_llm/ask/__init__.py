"""Answers of a model: generated one or many at a time, or scored by likelihood."""
