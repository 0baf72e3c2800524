"""How precisely products of float32 matrices are computed: a program's choice, told to other processes."""

import torch

BACKENDS = {"cuda_float32_precision": torch.backends.cuda.matmul, "cpu_float32_precision": torch.backends.mkldnn.matmul}
OLDER_NAMES = {("tf32", "tf32"): "high", ("tf32", "bf16"): "medium"}


def float32_precision() -> dict[str, str]:
    """For each kind of device: ieee, which none stands for too, tf32 or bf16.

    Not by torch.get_float32_matmul_precision, which raises where somebody has used both of PyTorch's ways to choose.
    """
    chosen = {name: backend.fp32_precision for name, backend in BACKENDS.items()}
    return {name: "ieee" if precision == "none" else precision for name, precision in chosen.items()}


def set_float32_precision(chosen: dict[str, str]) -> None:
    """As float32_precision said in another process; by the older way where that can say it, since who asks by that,
    such as a compiler, gets an error after the newer one was used."""
    if name := OLDER_NAMES.get(tuple(chosen[name] for name in BACKENDS)):
        torch.set_float32_matmul_precision(name)
        return
    here = float32_precision()
    for name, backend in BACKENDS.items():
        if chosen[name] != here[name]:
            backend.fp32_precision = chosen[name]
