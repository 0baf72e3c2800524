"""Batch inference: inputs (sources), decoding processes (decode, worker), the loop around the model (engine, compute),
output files (formats), parts and resuming (run), several processes (share). docs/batch.md tells how it works."""
