"""Benchmarks: one module per kernel family, every peer side by side in one process. Run `python -m bench --list`."""

FAMILIES = ("info_nce", "attention", "alignment", "quantize", "diffusion", "group_norm", "models", "decoding")
