"""Names of classes: the model's own, given ones, ImageNet's."""

import importlib.util

import pytest
from torch import nn

import swinfast
from swinfast import labels
from swinfast.labels import imagenet_labels


class TestLabels:
    def small(self, num_classes: int, **config) -> nn.Module:
        model = swinfast.create_model(
            "swinv2_cr_tiny_224", img_size=32, num_classes=num_classes, depths=(1,), num_heads=(3,)
        )
        model.pretrained_cfg = model.pretrained_cfg | config
        return model

    def test_of_the_model(self):
        assert swinfast.Predictor(self.small(2, label_names=["cat", "dog"])).labels == ("cat", "dog")

    @pytest.mark.parametrize("kind", [int, str])
    def test_by_number(self, kind):
        """As timm has them, as numbers or, out of JSON, as strings; some may be missing."""
        names = {kind(2): "dog", kind(0): "cat", kind(7): "none of this model's"}
        assert swinfast.Predictor(self.small(3, label_names=names)).labels == ("cat", "1", "dog")

    def test_given(self):
        model = self.small(2, label_names=["cat", "dog"])
        assert swinfast.Predictor(model, labels=["a", "b"]).labels == ("a", "b")

    def test_of_imagenet(self):
        labels = swinfast.Predictor(self.small(1000)).labels
        assert labels == imagenet_labels()
        assert len(labels) == 1000
        for index, name in {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 999: "toilet"}.items():
            assert name in labels[index]
        assert all(label.strip() for label in labels)

    def test_numbers_otherwise(self):
        assert swinfast.Predictor(self.small(3)).labels == ("0", "1", "2")
        assert swinfast.Predictor(self.small(3, label_names=["too", "few"])).labels == ("0", "1", "2")

    def test_wrong_number(self):
        with pytest.raises(ValueError, match="labels must name each of the 3 classes, got 2 names"):
            swinfast.Predictor(self.small(3), labels=["a", "b"])


def test_definitions_of_classes_are_timms(monkeypatch, timm):
    info = timm.data.ImageNetInfo("imagenet-1k")
    detailed = imagenet_labels("detail")
    assert detailed == tuple(info.index_to_description(index, detailed=True) for index in range(1000))
    assert imagenet_labels("name") == tuple(map(info.index_to_label_name, range(1000)))
    labels._definitions.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'detail' needs timm"):
        imagenet_labels("detail")
    assert imagenet_labels("description")[0] == "tench, Tinca tinca"
