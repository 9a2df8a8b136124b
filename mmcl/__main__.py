"""`python -m mmcl`: the same as the ``mmcl`` command."""

from mmcl.cli import main

main()
