"""Batch inference: inputs (sources), decoding processes (decode, worker), the loop around the model (engine, compute),
output files (formats, places), parts and resuming (parts), a process's share of a run (share), several processes
(processes), a whole run (run). docs/batch.md tells what it guarantees, docs/architecture.md how it is divided."""
