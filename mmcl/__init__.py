"""Training code for one embedding space of video, audio and text, on streamed shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["MultimodalModel", "__version__", "load_config"]

if TYPE_CHECKING:
    from mmcl.model import MultimodalModel
    from mmcl.recipe import load_config


def __getattr__(name: str) -> Any:
    # Imported when first used, so that `mmcl --help` does not load torch.
    if name == "MultimodalModel":
        from mmcl.model import MultimodalModel

        return MultimodalModel
    if name == "load_config":
        from mmcl.recipe import load_config

        return load_config
    raise AttributeError(f"module 'mmcl' has no attribute {name!r}")
