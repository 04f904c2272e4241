"""Accuracy by the protocol: questions posed, answers judged, evaluations compared."""
