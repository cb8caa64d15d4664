"""Triton kernels, one module per family; installed as `vlmfast.kernels`.

Importing the package does not import triton: a family's module does, the first time it is used.
"""

FAMILIES = ("info_nce", "attention", "quantize", "diffusion", "group_norm")
