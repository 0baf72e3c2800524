"""What GPUs can do, as their makers publish it: peaks that no program reaches."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """Dense matrix rates in TFLOP/s with float32 accumulation, memory in TB/s, clock in GHz (boost)."""

    name: str
    arch: str
    float16: float
    tf32: float
    float32: float
    bandwidth: float
    multiprocessors: int
    clock: float

    def matrix_rate(self, precision: str) -> float:
        """FLOP/s of products in float16, bfloat16, float32 or tf32."""
        return 1e12 * {"tf32": self.tf32, "float32": self.float32}.get(precision, self.float16)

    @property
    def issue_rate(self) -> float:
        """Instructions of warps a second: one for each of a multiprocessor's four schedulers and each clock."""
        return 4 * self.multiprocessors * self.clock * 1e9


GPUS = {
    "h100": Gpu("H100 SXM", "sm_90", 989.4, 494.7, 66.9, 3.35, 132, 1.83),
    "h200": Gpu("H200 SXM", "sm_90", 989.4, 494.7, 66.9, 4.8, 132, 1.83),
    "a100": Gpu("A100 SXM 80 GB", "sm_80", 312.0, 156.0, 19.5, 2.039, 108, 1.41),
    "l4": Gpu("L4", "sm_89", 121.0, 60.0, 30.3, 0.3, 58, 2.04),
    "rtx4090": Gpu("GeForce RTX 4090", "sm_89", 165.2, 82.6, 82.6, 1.008, 128, 2.52),
    "b200": Gpu("B200 SXM", "sm_100", 2250.0, 1125.0, 75.0, 8.0, 148, 1.85),
}
