"""``swinfast predict``: classify images."""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from .backends import CHOICES
from .exit_codes import INTERRUPTED, OK, SOME_FAILED
from .models import CONFIG_FILE, create_model
from .predict import Failure, Predictor, find_images
from .results import open_writer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add predict to the command line."""
    predict = commands.add_parser("predict", help="classify images", description="Classify images.")
    predict.set_defaults(run=_predict)
    add = predict.add_argument
    add("paths", nargs="+", metavar="PATH", help="image files, folders (searched recursively), glob patterns")
    add("--model", default="swinv2_cr_tiny_ns_224", help="name or folder of a model (default: %(default)s)")
    add("--checkpoint", default="", metavar="FILE", help="weights (default: the folder's, or the published ones)")
    add("--num-classes", type=int, metavar="N", help="classes of the checkpoint, where not the model's own")
    add("--device", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU where there is one)")
    add("--dtype", choices=DTYPES, default="float32", help="to compute in (default: %(default)s)")
    add("--backend", choices=CHOICES, default="auto", help="what computes (default: %(default)s)")
    add("--batch-size", type=int, default=32, metavar="N", help="images at a time (default: %(default)s)")
    add("--topk", type=int, default=5, metavar="K", help="classes for each image (default: %(default)s)")
    add("--output", metavar="FILE", help="a .csv or .jsonl file (default: a table on the terminal)")


def _predict(options: argparse.Namespace) -> int:
    files = find_images(options.paths)
    if not files:
        raise ValueError(f"found no images in {', '.join(options.paths)}")
    open_writer(options.output, options.topk)  # a wrong ending is said before anything is loaded
    overrides = {} if options.num_classes is None else {"num_classes": options.num_classes}
    has_weights = options.checkpoint or (Path(options.model) / CONFIG_FILE).is_file()
    model = create_model(options.model, pretrained=not has_weights, checkpoint_path=options.checkpoint, **overrides)
    predictor = Predictor(
        model,
        device=options.device,
        dtype=DTYPES[options.dtype],
        batch_size=options.batch_size,
        topk=options.topk,
        backend=options.backend,
    )
    failures = 0
    with open_writer(options.output, predictor.topk) as write, tqdm(total=len(files), unit="img", disable=None) as bar:
        try:
            for result in predictor.predict(files):
                if isinstance(result, Failure):
                    failures += 1
                    tqdm.write(f"swinfast: skipped {result.filename}: {result.reason}", file=sys.stderr)
                else:
                    write(result)
                bar.update()
        except KeyboardInterrupt:
            written = options.output or "the terminal"
            tqdm.write(f"swinfast: interrupted, the results so far are written to {written}", file=sys.stderr)
            return INTERRUPTED
    if failures:
        print(f"swinfast: {failures} of {len(files)} images could not be read", file=sys.stderr)
    return SOME_FAILED if failures else OK
