"""What a model is, as data: families, their modules, wiring and sizes."""
