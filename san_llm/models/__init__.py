"""Bases and adapters: found, downloaded, loaded, read as files; their cards."""
