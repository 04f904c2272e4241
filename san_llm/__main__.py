"""``python -m san_llm``: what the launcher starts."""

from san_llm.cli import main

main()
