"""`mmcl demo`: the main job, end to end, on clips recorded on the spot."""
