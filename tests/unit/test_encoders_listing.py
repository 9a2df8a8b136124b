"""`mmcl encoders`: every entry of the table, with sizes that are those of the networks, no wider than a terminal."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from mmcl.cli import app
from mmcl.encoders.build import TOWERS, build_encoder
from mmcl.encoders.listing import SHOWN, detail, measure, overview
from mmcl.encoders.video import TinyVideoOptions
from mmcl.types import ConfigError


def test_every_prefix_shows_names() -> None:
    prefixes = {entry for entry in TOWERS if ":" in entry}
    assert prefixes <= set(SHOWN)
    assert all(entry.weights for entry in TOWERS.values())


def test_sizes_are_those_of_the_networks() -> None:
    whole = sum(p.numel() for p in build_encoder(TinyVideoOptions()).parameters())
    assert measure("tiny_video").parameters == whole
    resnet = measure("torchvision:r3d_18")
    assert resnet.parameters == 33_371_472 - 400 * 513, "torchvision's own count without its classifier"
    assert (resnet.width, resnet.modality, resnet.eats) == (512, "video", "16 frames of 112 px at 15/s")


def test_one_name_is_explained_with_its_options() -> None:
    done = CliRunner().invoke(app, ["encoders", "timm:tf_efficientnet_lite0"])
    assert done.exit_code == 0 and "package:efficientnet-lite0: Apache-2.0" in done.output
    assert "    lock ('none'): " in done.output and "    frames (None): frames of a window" in done.output
    assert max(map(len, done.output.splitlines())) <= 80
    assert "timm:resnet50" in detail("timm:").splitlines()
    with pytest.raises(ConfigError, match="did you mean 'torchvision:r3d_18'"):
        detail("torchvision:r3d_19")


@pytest.mark.slow
def test_the_list_holds_the_table_and_fits_a_terminal() -> None:
    text = overview()
    assert max(map(len, text.splitlines())) <= 80
    for entry in TOWERS:
        assert any(line.startswith(entry) for line in text.splitlines())
        assert all(f"  {name} " in text for name in SHOWN.get(entry, ()))
