"""Batch inference on a Ray cluster: classes of a folder of images, in one call and step by step.

python examples/batch_ray.py OUTPUT_FOLDER     # on a cluster: ray job submit -- python ...
"""

import sys
from pathlib import Path

import ray

import swinfast.ray

DIGITS = Path(__file__).parent.absolute() / "digits"


def main(folder: str) -> None:
    ray.init(log_to_driver=False)  # the cluster this runs on, or else a small one on this machine
    model = swinfast.create_model(str(DIGITS))
    print(swinfast.ray.predict(DIGITS / "images", folder, model=model, topk=3))

    # The same by hand, where images come from another data set of Ray's, such as read_parquet or read_webdataset.
    images = ray.data.read_binary_files(str(DIGITS / "images"), include_paths=True)
    predictions = images.map_batches(
        swinfast.ray.Predictor,
        fn_constructor_args=(model,),
        fn_constructor_kwargs={"topk": 3},
        batch_size=32,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    print(predictions.select_columns(["filename", "top1_label", "top1_prob"]).take(3))


if __name__ == "__main__":
    main(sys.argv[1])
