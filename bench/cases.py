"""The operations that a model's forward calls: their shapes, random inputs for them, and what their outputs must be.

A forward on meta tensors is recorded, so the shapes are those of real models. Inputs are random, never zeros. An output
is held to the numerics policy (docs/numerics.md): the definition in reference.ops in float64, and the error of the same
definition in the working dtype.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from swinfast.kernels.configs import MANY, Choose, Config, override
from swinfast.kernels.launch import INTERPRETED, Launch, record
from swinfast.kernels.shapes import PRECISIONS
from swinfast.kernels.stages import BOTH_LAYOUTS
from swinfast.kernels.window_attention import padded_size
from swinfast.kernels.windows import LARGEST_TILE, arranged, slots
from swinfast.reference import ops
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import swinfast
from swinfast.verify import ABSOLUTE, FACTOR, tf32_as_in_products

Arguments = dict[str, Any]

SMALL = {"img_size": 32, "patch_size": 2, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
MODELS = {  # for tests: whole windows; windows, channels and heads that are padded; the other family
    "small": SMALL,
    "padded": SMALL | {"img_size": 36, "embed_dim": 24, "window_size": 7},
    "small V2": SMALL | {"pretrained_window_sizes": (3, 0)},
}
BATCHED = ("images", "x", "qkv", "residual")  # arguments whose first dimension is the batch
IN_A_TILE = ("attention_block", "attention_parts", "qkv_attention")  # forms for windows of at most LARGEST_TILE tokens
IN_PARTS = ("attention_parts", "mlp_parts")  # operations whose results are [..., parts, C], to be added up
LARGEST_PARTS = 64 << 20  # bytes
IMAGES_AT_ONCE = 16  # that a definition is computed for in float64
LOG2_E = math.log2(math.e)
FORMS = {  # the parts of a block that several kernels can compute, all in one kernel and in as many as there are
    "fused": {
        "attention_half": "attention_block",
        "projection": "linear_norm_residual",
        "mlp_half": "mlp_block",
        "mlp_output": "linear_norm_residual",
    },
    "parts": {
        "attention_half": "attention_parts",
        "projection": "linear",
        "mlp_half": "mlp_parts",
        "mlp_output": "linear",
    },
    "heads": {
        "attention_half": "qkv_attention",
        "projection": "linear_norm_residual",
        "mlp_half": "linear",
        "mlp_output": "linear",
    },
    "partly": {
        "attention_half": "window_attention",
        "projection": "linear_norm_residual",
        "mlp_half": "linear",
        "mlp_output": "linear_norm_residual",
    },
    "apart": {
        "attention_half": "window_attention",
        "projection": "linear",
        "mlp_half": "linear",
        "mlp_output": "linear",
    },
}


class Wrong(Exception):
    """An output that the numerics policy refuses."""


class Case(NamedTuple):
    """Calls of one operation with arguments of the same kind.

    Attributes:
        operation: Its name.
        arguments: By name; tensors are on the meta device.
        calls: How many of them a forward makes.
        launch: What one of them launches.
        lookup: (kernel, sizes) that its configuration was looked up by.
        precision: float16, bfloat16, float32 or tf32.
    """

    operation: str
    arguments: Arguments
    calls: int
    launch: Launch
    lookup: tuple[str, tuple[tuple[str, int], ...]]
    precision: str

    @property
    def key(self) -> tuple:
        """The same for two cases that compute the same. The table's padding is a matter of configuration."""
        kinds = ((name, _kind(value)) for name, value in self.arguments.items() if name != "table")
        return self.operation, self.precision, tuple(kinds)

    @property
    def shape(self) -> str:
        """The shape of the stream and what else tells calls apart, in short."""
        words = []
        for name, value in self.arguments.items():
            if name in BATCHED[:3] or name == "weight":
                words.append(f"{name}={'x'.join(map(str, value.shape))}")
            elif name in ("fc1_weight", "logit_scale"):
                words.append(f"{'hidden' if name == 'fc1_weight' else 'heads'}={value.shape[0]}")
            elif name in ("window_size", "shift_size"):
                words.append(f"{name.partition('_')[0]}={'x'.join(map(str, value))}")
            elif name == "extra_weight" and value is not None:
                words.append("extra_norm")
            elif value is True:
                words.append(name)
        return " ".join(words)


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.stride()
    return tuple(value) if isinstance(value, list) else value


def model_named(name: str, device: torch.device | str = "meta") -> nn.Module:
    """One of the models for tests, or any that swinfast makes."""
    options = MODELS.get(name, {})
    if options:
        name = "swinv2_tiny_window8_256" if "V2" in name else "swinv2_cr_tiny_224"
    return swinfast.create_model(name, device=device, **options).eval()


def stay_in_cache(channels: int, rows: int) -> bool:
    """Whether a result in parts, one for every 32 channels, may stay in a GPU's cache: else parts are not worth it."""
    return 4 * rows * channels * (channels // 32) <= LARGEST_PARTS


def choose_forms(forms: dict[str, str], channels: int | None = None) -> Choose:
    """What override takes to compute blocks (those of one number of channels) in some forms, where they can be."""

    def choose(kernel: str, shape: dict[str, int]) -> Config | None:
        use = forms.get(kernel)
        if use is None or (channels is not None and shape["channels"] != channels):
            return None
        if use in IN_A_TILE and shape["tokens"] > LARGEST_TILE:
            return None
        if use in IN_PARTS and not stay_in_cache(shape["channels"], shape["rows"]):
            return None
        if use in BOTH_LAYOUTS and shape["rows"] >= MANY:  # how the table is laid out stays as the tables have it
            return None
        return Config({"use": use}, 4, 1, "chosen for this run")

    return choose


@contextmanager
def tf32_setting(precision: str) -> Iterator[None]:
    """Products and convolutions of float32 as a precision wants them: in TF32 for tf32, else exact."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32  # the older of PyTorch's two settings sets both; the newer alone breaks the compiler
    matmul.allow_tf32 = precision == "tf32"
    try:
        with tf32_as_in_products():
            yield
    finally:
        matmul.allow_tf32 = before


class _Calls(TorchDispatchMode):
    """Records the project's operators, with the launch and the lookup of each."""

    def __init__(self, launches: list[Launch], lookups: list[tuple]):
        super().__init__()
        self.launches, self.lookups, self.calls = launches, lookups, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "swinfast" and func._schema.name != "swinfast::cpb_bias":
            parameters = func._schema.arguments
            given = dict(zip((p.name for p in parameters), args, strict=False)) | (kwargs or {})
            arguments = {p.name: given.get(p.name, p.default_value) for p in parameters}
            name = func._schema.name.partition("::")[2]
            self.calls.append((name, arguments, self.launches[-1], self.lookups[-1]))
        return out


def cases_of(model: nn.Module, batch: int, precision: str, arch: str, forms: Callable | None = None) -> list[Case]:
    """The operations of a forward with bias tables at hand, in the order of their first call.

    Args:
        model: On the meta device, in any dtype.
        precision: float16, bfloat16, float32 or tf32.
        arch: The architecture whose tables of configurations hold.
        forms: From choose_forms, for another composition than the tables'.
    """
    lookups: list[tuple] = []

    def choose(kernel: str, shape: dict[str, int]) -> Config | None:
        lookups.append((kernel, tuple((name, int(size)) for name, size in shape.items())))
        return forms(kernel, shape) if forms else None

    forward = _forward_of(model, batch, precision)
    with torch.no_grad(), tf32_setting(precision), record(arch) as launches, override(choose):
        recorded = _Calls(launches, lookups)
        with recorded:
            forward()
    found: dict[tuple, Case] = {}
    for name, arguments, launched, lookup in recorded.calls:
        case = Case(name, arguments, 1, launched, lookup, precision)
        before = found.get(case.key)
        found[case.key] = case if before is None else before._replace(calls=before.calls + 1)
    return list(found.values())


def first_launches(
    model: nn.Module, batch: int, precision: str, arch: str, forms: Callable | None = None
) -> list[Launch]:
    """All that a first forward launches, which makes the bias tables too. Arguments are as in cases_of."""
    forward = _forward_of(model, batch, precision)
    with torch.no_grad(), tf32_setting(precision), record(arch) as launches, override(forms or (lambda *_: None)):
        forward()
    return launches


def _forward_of(model: nn.Module, batch: int, precision: str) -> Callable[[], Tensor]:
    fast = swinfast.optimize(model, dtype=PRECISIONS[precision], backend="triton")
    images = torch.empty(batch, 3, *model.img_size, device="meta", dtype=PRECISIONS[precision])
    return lambda: fast(images)


def inputs_of(case: Case, device: torch.device, seed: int = 0) -> Arguments:
    """Random arguments of a case; the table is as yet that of the window's tokens alone (see call_arguments)."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(like: Tensor, std: float = 1.0, mean: float = 0.0) -> Tensor:
        values = torch.randn(like.shape, generator=generator, device=device, dtype=torch.float32)
        return (values * std + mean).to(like.dtype)

    def tensor(name: str, like: Tensor) -> Tensor:
        if name in BATCHED:
            return normal(like)
        if name == "logit_scale":  # some above the clamp
            value = normal(like).clamp(-1, 1) + 2.5
            value[::3] = math.log(100.0) + 0.7
            return value
        if name == "table":
            return _table(case, like, normal)
        if name in ("norm_weight", "extra_weight"):
            return normal(like, 0.3, mean=1.0)
        if name.endswith("weight"):
            return normal(like, math.prod(like.shape[1:]) ** -0.5)
        return normal(like, 0.3)

    return {n: tensor(n, value) if isinstance(value, Tensor) else value for n, value in case.arguments.items()}


def _table(case: Case, like: Tensor, normal: Callable[..., Tensor]) -> Tensor:
    """[types, heads, N, N] with N the tokens of a window: what stands at the start of a table of cpb_bias."""
    window, shift = case.arguments["window_size"], case.arguments["shift_size"]
    tokens = math.prod(window)
    bias = normal(torch.empty(*like.shape[:2], tokens, tokens, device="meta"))
    masks = ops.window_masks(window, shift, bias.device)[: like.shape[0], None]
    return ((bias + masks * ops.MASK_VALUE) * LOG2_E).to(like.dtype)


def call_arguments(case: Case, inputs: Arguments) -> Arguments:
    """inputs_of, or a case's own arguments, with the table padded as the present configuration wants it."""
    if "table" not in inputs:
        return inputs
    table, window = inputs["table"], tuple(case.arguments["window_size"])
    types, heads = table.shape[:2]
    in_threads = case.arguments["table"].dim() == 5  # of the two layouts, arranged()
    if in_threads:
        queries = keys = slots(window)
    else:
        bias = inputs["qkv_bias"]
        queries, keys = padded_size(table.device, bias.dtype, window, len(bias) // 3 // heads)
    shape = (types, heads, queries, keys)
    padded = torch.zeros(shape, dtype=table.dtype, device="meta" if table.is_meta else "cpu")
    if not table.is_meta:
        tokens = math.prod(window)
        padded[..., tokens:] = -math.inf
        padded[:, :, :tokens, :tokens] = table.cpu()
    return inputs | {"table": (arranged(padded) if in_threads else padded).to(table.device)}


def choose_config(case: Case, chosen: Config) -> Choose:
    """What override takes to give a case's kernel a configuration, and others none."""
    return lambda kernel, shape: chosen if kernel == case.lookup[0] else None


def launch_of(case: Case, chosen: Config, arch: str) -> Launch:
    """What a case launches with another configuration."""
    choose = choose_config(case, chosen)
    with torch.no_grad(), tf32_setting(case.precision), record(arch) as launches, override(choose):
        operation(case)(**call_arguments(case, case.arguments))
    return launches[-1]


def operation(case: Case) -> Callable[..., Tensor]:
    """The function that a case calls."""
    return getattr(importlib.import_module(f"swinfast.kernels.{case.operation}"), case.operation)


def definition(case: Case, inputs: Arguments, dtype: torch.dtype) -> tuple[Callable[..., Tensor], Arguments]:
    """The function of reference.ops that defines a case, and its arguments in a dtype, made ahead of any timing."""
    a = {
        name: value.to(dtype) if isinstance(value, Tensor) and name != "table" else value
        for name, value in inputs.items()
    }
    if "table" in a:
        bias = (inputs["table"].double() / LOG2_E).to(dtype)
        a["bias"] = bias if len(bias) == 4 else bias.expand(4, -1, -1, -1)
        del a["table"]
    for norm in ("norm", "extra"):
        vectors = [a.pop(f"{norm}_{part}", None) for part in ("weight", "bias")]
        eps = a.pop("eps" if norm == "norm" else "extra_eps", None)
        if eps is not None:
            a["extra_norm" if norm == "extra" else "norm"] = None if vectors[0] is None else (*vectors, eps)
    for unused in ("scale", "shift"):
        a.pop(unused, None)
    return getattr(ops, case.operation), a


class Errors(NamedTuple):
    """Relative to the RMS of the oracle."""

    rms: float
    largest: float


class Oracle:
    """What a case's output must be for some inputs: exact, and how far plain PyTorch is off in the same dtype.

    Computed some images at a time: in float64 a whole batch would not fit beside what it is made of.
    """

    def __init__(self, case: Case, inputs: Arguments):
        self.dtype = PRECISIONS[case.precision]
        self.in_parts = case.operation in IN_PARTS
        self.exact, plain = [], []
        with torch.no_grad():
            for part in _parts(inputs):
                for outputs, dtype in ((self.exact, torch.float64), (plain, self.dtype)):
                    function, arguments = definition(case, part, dtype)
                    outputs.append(function(**arguments))
        self.plain = self._errors(plain)

    def check(self, got: Tensor) -> float:
        """The relative RMS error of an output.

        Raises:
            Wrong: It is not as right as plain PyTorch.
        """
        dtype, shape = self.dtype, (sum(map(len, self.exact)), *self.exact[0].shape[1:])
        if self.in_parts:
            dtype, shape = torch.float32, (*shape[:-1], got.shape[-2], shape[-1])
        if tuple(got.shape) != shape or got.dtype != dtype:
            raise Wrong(f"gave {got.dtype} {list(got.shape)}, expected {dtype} {list(shape)}")
        got = got.sum(-2) if self.in_parts else got
        errors = self._errors(got.split([len(part) for part in self.exact]))
        # the interpreter cuts float32 to bfloat16 where a GPU rounds: twice the error
        factor = 2 * FACTOR if INTERPRETED and self.dtype == torch.bfloat16 else FACTOR
        for name, absolute in (("rms", ABSOLUTE[self.dtype]), ("largest", 8 * ABSOLUTE[self.dtype])):
            error, allowed = getattr(errors, name), factor * getattr(self.plain, name) + absolute
            if not error <= allowed:
                raise Wrong(f"{name} error {error:.2e} is above {allowed:.2e}")
        return errors.rms

    def _errors(self, parts: Any) -> Errors:
        squares = total = count = largest = 0.0
        for got, exact in zip(parts, self.exact, strict=True):
            difference = got.double() - exact
            squares += difference.square().sum().item()
            largest = max(largest, difference.abs().max().item()) if not math.isnan(squares) else math.nan
            total += exact.square().sum().item()
            count += exact.numel()
        size = math.sqrt(total / count)
        return Errors(math.sqrt(squares / count) / size, largest / size)


def _parts(inputs: Arguments) -> Iterator[Arguments]:
    batched = [name for name in BATCHED if inputs.get(name) is not None]
    for start in range(0, len(inputs[batched[0]]), IMAGES_AT_ONCE):
        yield inputs | {name: inputs[name][start : start + IMAGES_AT_ONCE] for name in batched}
