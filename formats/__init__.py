"""Bytes and number grids: what a checkpoint holds and what its numbers mean. No model meaning, no printing."""
