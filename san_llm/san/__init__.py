"""The method: who feeds whom, the scales, the adapted layers, the tuner that PEFT drives."""
