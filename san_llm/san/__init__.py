"""SAN itself: the propagation map, the layer, and the tuner that PEFT drives."""
