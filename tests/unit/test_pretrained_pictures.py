"""Weights from a package: EfficientNet-Lite0, read by its tower as its makers meant it, knows what is in a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mmcl.encoders import packages
from mmcl.encoders.frames import TimmFrames, TimmOptions
from mmcl.media.inputs import decode_windows
from mmcl.types import ConfigError

PACKAGE = "package:efficientnet-lite0"
# rows of ImageNet: tabby, tiger cat, Egyptian cat · espresso · missile
KNOWN = {"chelsea": {281, 282, 285}, "coffee": {967}, "rocket": {657}}


def test_pictures_have_their_class_among_the_first_five(tmp_path: Path) -> None:
    data = pytest.importorskip("skimage.data")
    tower = TimmFrames(TimmOptions(name="timm:tf_efficientnet_lite0", frames=1, pretrained=PACKAGE)).eval()
    # (x − 127) / 128, which is not what timm says of the same network
    assert tower.spec.mean == (127 / 255,) * 3 and tower.spec.std == (128 / 255,) * 3 and tower.spec.size == 224
    tensors = packages.load("efficientnet-lite0")
    assert len(tensors) == 247
    tower.load_state_dict(tower.foreign(tensors))
    pictures = []
    for name in KNOWN:
        Image.fromarray(getattr(data, name)()).save(tmp_path / f"{name}.png")
        pictures.append(torch.from_numpy(decode_windows(tmp_path / f"{name}.png", tower.spec, 1)))
    with torch.no_grad():
        logits = tower(torch.cat(pictures)).pooled @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    for row, classes in zip(logits.topk(5).indices.tolist(), KNOWN.values(), strict=True):
        assert row[0] in classes and classes <= set(row)


def test_other_weights_keep_timms_pixels() -> None:
    with torch.device("meta"):
        tower = TimmFrames(TimmOptions(name="timm:tf_efficientnet_lite0", frames=1))
    assert tower.spec.mean == (0.5,) * 3


def test_an_unknown_package_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"package:efficientnet-lite1.*did you mean 'package:efficientnet-lite0'"):
        packages.load("efficientnet-lite1")
