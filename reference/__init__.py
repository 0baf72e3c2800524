"""The model in plain PyTorch, written to be read; nothing here is fast.

``ops`` defines every operation that a kernel implements; ``cr`` and ``v2`` compose them into the two families of Swin
Transformer V2. All are the definition that the rest of swinfast is measured against.
"""

if __name__ != "swinfast.reference":  # models of another name would be copies, which swinfast.optimize does not know
    raise ModuleNotFoundError(f"import swinfast.reference, not {__name__}", name=__name__)

from .cr import SwinTransformerV2Cr
from .features import FeatureListNet
from .v2 import SwinTransformerV2

__all__ = ["FeatureListNet", "SwinTransformerV2", "SwinTransformerV2Cr"]
