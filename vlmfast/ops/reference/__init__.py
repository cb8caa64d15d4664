"""The ops' definitions in plain PyTorch."""
