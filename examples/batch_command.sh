#!/bin/sh
# Batch inference from the command line: classes, embeddings and feature maps of a folder of images.
#   sh examples/batch_command.sh OUTPUT_FOLDER
# Each command can be killed at any moment and started again: it goes on from the last finished part.
set -eu
digits=$(dirname "$0")/digits
python -m swinfast predict "$digits/images" --model "$digits" --topk 3 --output "$1/classes.csv" --resume
python -m swinfast embed "$digits/images" --model "$digits" --output "$1/embeddings.npy" --resume
python -m swinfast features "$digits/images" --model "$digits" --stages -1 --output "$1/features.npy" --resume
# All GPUs of a machine, a process for each: --devices all. A list of files: --files-from FILE.
# Tar shards (webdataset): "shards/*.tar". Hugging Face's parquet files: "data/*.parquet".
