"""From the public annotation files of a data set, and a folder of its media, to the table that shards are made of."""

from __future__ import annotations

from mmcl.shards.importers.table import IMPORTERS, Imported, import_annotations

__all__ = ["IMPORTERS", "Imported", "import_annotations"]
