"""Writes configs/schema.json, by which editors complete and check configuration files."""

from __future__ import annotations

import json
from pathlib import Path

from mmcl.recipe import json_schema


def main() -> None:
    path = Path(__file__).parents[1] / "configs" / "schema.json"
    path.write_text(json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
