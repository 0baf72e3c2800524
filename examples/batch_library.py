"""Batch inference as a library: classes, embeddings and feature maps of a folder of images.

python examples/batch_library.py OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import numpy as np

import swinfast

DIGITS = Path(__file__).parent / "digits"


def main(folder: Path) -> None:
    model = swinfast.create_model(str(DIGITS))
    images = DIGITS / "images"

    predictor = swinfast.Predictor(model, topk=3)
    for result in predictor.predict([images / "two_0307.png", images / "missing.png"]):
        print(result)  # a Prediction, or a Failure with the reason

    # Into a file: killed at any moment and started again, it goes on from the last finished part.
    print(predictor.write(images, folder / "classes.csv", resume=True))

    print(swinfast.Embedder(model).write(images, folder / "embeddings.npy", resume=True))
    embeddings = np.load(folder / "embeddings.npy", mmap_mode="r")
    names = (folder / "embeddings.index.csv").read_text().splitlines()[1:]
    lengths = np.linalg.norm(embeddings, axis=1)
    nearest = (embeddings[1:] @ embeddings[0] / lengths[1:]).argmax() + 1
    print(f"{Path(names[0]).name} is most like {Path(names[nearest]).name}")

    print(swinfast.FeatureExtractor(model, stages=[-1]).write(images, folder / "features.npy", resume=True))
    print(f"feature maps: {np.load(folder / 'features.npy', mmap_mode='r').shape}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
