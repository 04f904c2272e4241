"""Arithmetic with its gradients: tensors in, tensors out."""
