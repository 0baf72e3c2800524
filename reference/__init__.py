"""The model in plain PyTorch, written to be read; nothing here is fast.

``ops`` defines every operation that a kernel implements; ``model`` composes them into Swin Transformer V2
(CR). Both are the definition that the rest of swinfast is measured against.
"""

if __name__ != "swinfast.reference":  # models of another name would be copies, which swinfast.optimize does not know
    raise ModuleNotFoundError(f"import swinfast.reference, not {__name__}", name=__name__)

from .features import FeatureListNet
from .model import SwinTransformerV2Cr

__all__ = ["FeatureListNet", "SwinTransformerV2Cr"]
