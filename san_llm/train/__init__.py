"""A run of training, from a recipe to an adapter; it can stop anywhere and go on."""
