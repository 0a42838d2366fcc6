"""Pure tensor mathematics: torch, NumPy and array libraries only; no registry, no config."""
