"""A small web app that searches embedded shards by text, or by an uploaded picture, video or sound."""
