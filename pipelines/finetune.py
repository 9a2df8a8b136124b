"""Fine-tuning of a checkpoint on labelled (or captioned) shards, then its test: T windows × 3 crops.

accelerate launch [--config_file configs/accelerate/X.yaml] pipelines/finetune.py \
    configs/finetune/classify.yaml model.towers.video.pretrained=RUN data.shards=TRAIN --test TEST [dotted.path=value …]
"""

from __future__ import annotations

from pathlib import Path

from pretrain import train, train_parser

from mmcl.cli import guarded


def main() -> None:
    """Reads the command line, trains, and reports on the test shards."""
    parser = train_parser(__doc__)
    parser.add_argument("--test", required=True, help="shards that are kept for the test")
    parser.add_argument("--report", type=Path, help="folder of the report; default: `test` in the run folder")
    parser.add_argument("--clips", type=int, help="T, windows of a test sample; default: evaluate.clips of the run")
    parser.add_argument("--crops", type=int, choices=(1, 3), default=1, help="of each test picture, on its long side")
    arguments = parser.parse_intermixed_args()

    def run() -> None:
        folder = train(arguments)
        if folder is None:  # a dry run, or one that was asked to stop
            return

        from mmcl.distributed import Comm
        from mmcl.distributed.launched import launched
        from mmcl.evaluation.fine_tuned import evaluate_fine_tuned
        from mmcl.evaluation.show import print_evaluation
        from mmcl.evaluation.task_report import TaskReport, first_lines

        out = arguments.report or folder / "test"
        with launched():
            found = evaluate_fine_tuned(folder, arguments.test, out, clips=arguments.clips, crops=arguments.crops)
            if Comm.current().rank > 0:
                return
            if isinstance(found, TaskReport):
                print("\n".join([*first_lines(found), f"report: {out / 'report.html'}"]))
            else:
                print_evaluation(found)

    guarded(run)


if __name__ == "__main__":
    main()
