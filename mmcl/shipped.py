"""Files that come with the package but are not imported: launchable pipelines and configurations."""

from __future__ import annotations

from pathlib import Path

from mmcl.types import ConfigError


def shipped(name: str) -> Path:
    """The path of ``pipelines/…`` or ``configs/…``, in a checkout or in an installed wheel.

    Raises:
        ConfigError: no such file came with the package.
    """
    package = Path(__file__).parent
    for root in (package.parent, package / "_shipped"):
        if (root / name).exists() and ((root / "pyproject.toml").exists() or root.name == "_shipped"):
            return root / name
    raise ConfigError(f"{name}: did not come with this installation of mmcl")
