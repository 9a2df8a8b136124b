"""Loading a configuration: YAML, dotted overrides, one typed frozen tree, errors that name the path."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mmcl.types import ConfigError


class Options(BaseModel):
    """Base of every part of a configuration: frozen, unknown keys refused, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


T = TypeVar("T", bound=Options)
