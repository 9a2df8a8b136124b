"""Multiple-choice video question answering: trains, then scores; on one process or under `accelerate launch`.

    python pipelines/video_qa.py configs/pretrain/video_qa.yaml data.shards=qa/train train.out=runs/qa --test qa/test
    python pipelines/video_qa.py runs/qa --score --test qa/test

`mmcl shards reshard CLIPS --questions FILE.jsonl --out qa/train` attaches questions to shards of clips.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from mmcl.cli import guarded


def main() -> None:
    """Reads the command line, trains where a configuration is given, and scores where test shards are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file; with --score a run folder or checkpoint")
    parser.add_argument("overrides", nargs="*", help="changes to the file: dotted.path=value")
    parser.add_argument("--resume", nargs="?", const="auto", help="as in pipelines/pretrain.py")
    parser.add_argument("--score", action="store_true", help="train nothing")
    parser.add_argument("--test", help="shards with KEY.qa.json to score on")
    parser.add_argument("--blank-video", action="store_true", help="score with black frames: what texts give away")
    parser.add_argument("--out", type=Path, help="a JSON file for the scores")
    arguments = parser.parse_intermixed_args()
    guarded(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    from mmcl.folders import check_resume
    from mmcl.types import ConfigError

    check_resume(arguments.resume)
    run = arguments.config
    if arguments.score and (arguments.test is None or arguments.overrides):
        raise ConfigError("--score takes a run folder and --test SHARDS, no overrides")
    if not arguments.score:
        from mmcl.recipe import load_config
        from mmcl.training.launch import pretrain

        config = load_config(arguments.config, arguments.overrides)
        run = config.train.out
        if not pretrain(config, resume=arguments.resume):
            return
    if arguments.test is None or os.environ.get("RANK", "0") != "0":
        return

    from mmcl.evaluation.video_qa import score_questions

    scores = score_questions(run, arguments.test, blank_video=arguments.blank_video)
    for line in scores.lines():
        print(line)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(scores.as_json(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
