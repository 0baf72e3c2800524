"""Feature maps of a model's stages, as timm's ``features_only`` models give them."""

from collections.abc import Sequence

from torch import Tensor, nn

from .classifier import Classifier, take_indices


class FeatureInfo:
    """What the chosen feature maps are: channels() and reduction() (the stride against the image), one each."""

    def __init__(self, info: list[dict], out_indices: Sequence[int]):
        self.info = info
        self.out_indices = tuple(out_indices)

    def channels(self) -> list[int]:
        return [self.info[index]["num_chs"] for index in self.out_indices]

    def reduction(self) -> list[int]:
        return [self.info[index]["reduction"] for index in self.out_indices]

    def module_name(self) -> list[str]:
        return [self.info[index]["module"] for index in self.out_indices]


class FeatureListNet(nn.ModuleDict):
    """A model cut down to its patch embedding and stages, which returns a list of maps as they are between its parts:
    [B, C, H, W] in the CR family, [B, H, W, C] in V2.

    The children are named as timm names them: ``patch_embed``, ``stages_0``, ``stages_1``, … (in V2 ``layers_0``, …).

    Args:
        model: The model to take the modules from.
        out_indices: Stages to return, negative ones from the end, or the number of last stages; maps come in the order
            of the stages.
    """

    def __init__(self, model: Classifier, out_indices: int | Sequence[int]):
        stages, name = model.all_stages(), model.stages_name
        taken = take_indices(len(stages), out_indices)
        stages = {f"{name}_{index}": stage for index, stage in enumerate(stages[: max(taken) + 1])}
        super().__init__({"patch_embed": model.patch_embed, **stages})
        self.feature_info = FeatureInfo(model.feature_info, taken)
        self.img_size = model.img_size
        self.in_chans = model.in_chans
        self.returned = {f"{name}_{index}" for index in taken}

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for name, module in self.items():
            x = module(x)
            if name in self.returned:
                features.append(x)
        return features
