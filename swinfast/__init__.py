"""Fast Swin Transformer V2 inference with unchanged answers.

    fast = swinfast.optimize(model)

See README.md for the tour and docs/architecture.md for how it is built.
"""

from pathlib import Path

# In a plain checkout the packages kernels and reference lie beside this folder, not in it; once installed, in it.
if not (Path(__file__).parent / "reference").exists():
    __path__.append(str(Path(__file__).parents[1]))

__version__ = "0.1.0"

from .batch.sources import Images
from .checkpoints import CheckpointError, load_checkpoint
from .models import create_model, list_models
from .optimize import optimize, refresh
from .predict import Embedder, Failure, FeatureExtractor, Features, Prediction, Predictor
from .preprocess import transform_of
from .report import Report, report
from .verify import Verification, verify

__all__ = [
    "CheckpointError",
    "Embedder",
    "Failure",
    "FeatureExtractor",
    "Features",
    "Images",
    "Prediction",
    "Predictor",
    "Report",
    "Verification",
    "create_model",
    "list_models",
    "load_checkpoint",
    "optimize",
    "refresh",
    "report",
    "transform_of",
    "verify",
]
