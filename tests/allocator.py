"""What PyTorch's allocator would reserve of a GPU's memory for a computation, counted on meta tensors."""

from typing import Any

from swinfast.memory import LiveBytes

SMALL = 1 << 20  # bytes of the largest block of segments of twice as much
MIDDLE = 10 << 20  # of the smallest that has no segment of twice as much
LARGE = 2 << 20  # of which the other segments are a multiple


class Reserved(LiveBytes):
    """By the rules of torch's CUDACachingAllocator.

    Attributes:
        segments: Lists of blocks [bytes, the storage that has it or None].
    """

    def __init__(self, room: int = 0):
        """room: Bytes that are asked for at once, before anything else, and given back."""
        super().__init__()
        self.segments: list[tuple[bool, list[list]]] = []
        self.had: set[int] = set()
        if room:
            self._take(0, room)
            self._give(0)

    @property
    def reserved(self) -> int:
        return sum(size for _, blocks in self.segments for size, _ in blocks)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        sizes = dict(zip(self.alive, self.sizes(), strict=True))
        for key in self.had - sizes.keys():
            self._give(key)
        for key in sizes.keys() - self.had:
            self._take(key, sizes[key])
        self.had = set(sizes)
        return out

    def _take(self, key: int, size: int) -> None:
        size = max(512, -(-size // 512) * 512)
        small = size <= SMALL
        fitting = [
            (block[0], place, blocks)
            for is_small, blocks in self.segments
            for place, block in enumerate(blocks)
            if is_small == small and block[1] is None and block[0] >= size
        ]
        if not fitting:
            whole = 2 * SMALL if small else 2 * MIDDLE if size < MIDDLE else -(-size // LARGE) * LARGE
            self.segments.append((small, [[whole, None]]))
            fitting = [(whole, 0, self.segments[-1][1])]
        found, place, blocks = min(fitting, key=lambda one: one[0])
        rest = found - size
        if rest >= 512 if small else rest > SMALL:
            blocks[place : place + 1] = [[size, key], [rest, None]]
        else:
            blocks[place][1] = key

    def _give(self, key: int) -> None:
        for _, blocks in self.segments:
            for block in blocks:
                if block[1] == key:
                    block[1] = None
            for place in range(len(blocks) - 2, -1, -1):
                if blocks[place][1] is None and blocks[place + 1][1] is None:
                    blocks[place][0] += blocks.pop(place + 1)[0]
