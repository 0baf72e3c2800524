"""The fused kernels. They exist only as ``swinfast.kernels``.

The folder's own name belongs to another package on the index, for which transformers and others probe; started in a
checkout, they must find nothing here.
"""

if __name__ != "swinfast.kernels":
    raise ModuleNotFoundError(f"import swinfast.kernels, not {__name__}", name=__name__)
