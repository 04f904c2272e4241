"""``python -m san_llm``: what the launcher starts."""

from __future__ import annotations

from san_llm.cli import main

main()
