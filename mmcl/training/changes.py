"""What differs between the configuration of a checkpoint and the one that is to go on with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmcl.config import build, read_yaml
from mmcl.recipe import RunConfig
from mmcl.types import ConfigError

FREE = (
    "data.allow_pipe",
    "data.allow_shared_streams",
    "data.cache_bytes",
    "data.cache_dir",
    # may lie elsewhere: the stream compares what it holds
    "data.clusters",
    "data.connections",
    "data.in_process",
    "data.max_skipped_in_a_row",
    "data.max_skipped_rate",
    "data.read_ahead_bytes",
    "data.retries",
    "data.retry_seconds",
    "data.stall_seconds",
    # may lie elsewhere: the stream compares what they hold
    "data.shards",
    "data.sources",
    "data.timeout_seconds",
    "data.workers",
    "evaluate",
    "multistage.stages",
    "train.best",
    "train.checkpoint_every",
    "train.collapse",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.log_every",
    "train.nonfinite",
    "train.nonfinite_limit",
    "train.out",
    "train.processes",
    "train.sharding",
    "train.threads",
    "train.timeout_seconds",
    "train.trackers",
)
"""what may change between two parts of a run: none of it changes what is learned"""


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys.

    >>> flat({"a": {"b": 1}, "c": [2, 3]})
    {'a.b': 1, 'c.0': 2, 'c.1': 3}
    """
    if isinstance(tree, dict):
        return {key: value for name, node in tree.items() for key, value in flat(node, f"{prefix}{name}.").items()}
    if isinstance(tree, list):
        return {key: value for i, node in enumerate(tree) for key, value in flat(node, f"{prefix}{i}.").items()}
    return {prefix[:-1]: tree}


def check_unchanged(checkpoint: Path, config: RunConfig, allow: Sequence[str] = ()) -> list[str]:
    """The changes that ``allow`` lets through, as lines ``key: then → now``.

    Args:
        checkpoint: the folder of a checkpoint, which holds its configuration.
        config: the one to go on with.
        allow: dotted keys that may have changed, each with all below it.

    Raises:
        ConfigError: something else has changed; shows all of that. Or ``allow`` names what does not exist.
    """
    trees = _configuration(checkpoint / "config.yaml"), config.model_dump(mode="json")
    for key in allow:
        if not any(_has(tree, key.split(".")) for tree in trees):
            raise ConfigError(f"--allow: {key!r} is no key of this configuration, nor of that of {checkpoint}")
    then, now = map(flat, trees)
    changed = {
        key: f"{key}: {then.get(key)!r} → {now.get(key)!r}" for key in {**then, **now} if then.get(key) != now.get(key)
    }
    changed = {key: line for key, line in changed.items() if not _under(key, FREE)}
    refused = [key for key in changed if not _under(key, allow)]
    if refused:
        raise ConfigError(
            f"--resume: {checkpoint} was made by another configuration: {'; '.join(changed[key] for key in refused)}; "
            f"{' '.join(f'--allow {key}' for key in refused)} goes on all the same"
        )
    return list(changed.values())


def _has(tree: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        tree = dict(enumerate(tree)) if isinstance(tree, list) else tree
        name: Any = int(key) if key.isdecimal() else key
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


def _under(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _configuration(path: Path) -> Any:
    """With today's defaults for what it does not name; as it stands where today's options cannot read it."""
    tree = read_yaml(path)
    try:
        return build(RunConfig, tree).model_dump(mode="json")
    except ConfigError:
        return tree
