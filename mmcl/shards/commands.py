"""``mmcl shards …``: thin; what runs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmcl.progress import show_progress
from mmcl.types import DEFAULT_DECODER, ConfigError, redact

app = typer.Typer(
    help="Make, index, check, count, show and rewrite shards: plain tar files of training samples.",
    no_args_is_help=True,
)


@app.command()
def make(
    input: Annotated[
        str,
        typer.Argument(
            help="A folder of media (captions from NAME.txt or NAME.json beside them), or a CSV, TSV, JSONL or Parquet "
            "table with a column 'path' and any of: caption, captions (a list), start_seconds, end_seconds, crop_x, "
            "crop_y, crop_w, crop_h, label, group, split. Other columns are kept as metadata. Or WebDataset shards "
            "(video2dataset, open_clip): a folder of them, or a pattern such as 'in/{00000..00127}.tar' or 'in/*.tar'.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards; one folder below it per split.")],
    codec: Annotated[
        str,
        typer.Option(
            help="h264, mjpeg, or copy: the source's own stream, whole, with the window of a cut row in its JSON."
        ),
    ] = "h264",
    short_side: Annotated[
        int | None, typer.Option(help="Pixels of the shorter side; smaller videos keep their size.  [default: 128]")
    ] = None,
    crop: Annotated[
        str, typer.Option(help="X:Y:W:H, what to keep of each picture, in its own pixels; columns crop_x, … win.")
    ] = "",
    windows: Annotated[
        str, typer.Option(help="SECONDS[:STRIDE]: cut every row into windows; default: one sample per row.")
    ] = "",
    subtitles: Annotated[
        bool, typer.Option("--subtitles", help="One sample per cue of NAME.srt or NAME.vtt beside a video.")
    ] = False,
    merge_cues: Annotated[float, typer.Option(help="Join neighbouring cues until a sample has so many seconds.")] = 0.0,
    scenes: Annotated[
        bool, typer.Option("--scenes", help="Cut every video at its scene changes: one sample per scene.")
    ] = False,
    scene_detector: Annotated[
        str | None,
        typer.Option(
            help="pyav: hard cuts, by differences of frames; scenedetect: PySceneDetect (extra scenes).  "
            "[default: pyav]"
        ),
    ] = None,
    min_scene: Annotated[
        float | None, typer.Option(help="Seconds; a shorter scene stays with its neighbour.  [default: 0.5]")
    ] = None,
    dedup: Annotated[
        bool,
        typer.Option(
            "--dedup",
            help="Leave out rows of the same media bytes, stretch and crop as an earlier one. duplicates.jsonl names "
            "them either way.",
        ),
    ] = False,
    fps: Annotated[float | None, typer.Option(help="Frames per second at most; default: as the source.")] = None,
    gop: Annotated[
        int | None, typer.Option(help="Frames between key frames; short ones make random access fast.  [default: 16]")
    ] = None,
    crf: Annotated[
        int | None, typer.Option(help="Quality of H.264: 0 is lossless, 51 the worst.  [default: 23]")
    ] = None,
    audio_rate: Annotated[
        int | None,
        typer.Option(help="Audio samples per second at most; a standard rate.  [default: 32000, opus 48000]"),
    ] = None,
    audio_codec: Annotated[
        str | None,
        typer.Option(help="aac, opus, flac, wav (its own file) or copy.  [default: aac; with --codec copy: copy]"),
    ] = None,
    motion: Annotated[
        bool,
        typer.Option("--motion", help="Store motion vectors beside each video of H.264 or MPEG-4, as KEY.motion.npy."),
    ] = False,
    max_count: Annotated[int, typer.Option(help="Samples per shard at most.")] = 1_000,
    max_size: Annotated[int, typer.Option(help="Megabytes per shard at most.")] = 512,
    shuffle: Annotated[int, typer.Option(help="Seed of the order of samples in the shards.")] = 0,
    keep_order: Annotated[bool, typer.Option("--keep-order", help="Keep the order of the input instead.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one per core. Same output.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds per file; then it is skipped and named.")] = 300.0,
    engine: Annotated[
        str,
        typer.Option(
            help="pool: processes of this machine; ray: of a Ray cluster (extra ray) whose nodes see input and output "
            "at the same paths. Same output."
        ),
    ] = "pool",
    address: Annotated[
        str, typer.Option(help="Of the Ray cluster; default: RAY_ADDRESS, else one is started on this machine.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
) -> None:
    """Make training-ready shards from media and captions.

    Run it again to go on after an interruption, or to take in new rows: what is done is kept. Files that cannot be used
    are skipped and named in failures.jsonl.
    """
    from mmcl.shards.cut import parse_windows
    from mmcl.shards.make import describe_plan, make_shards
    from mmcl.shards.make_options import MakeOptions
    from mmcl.shards.transcode import MediaOptions, parse_crop

    for name, given in (("--scene-detector", scene_detector), ("--min-scene", min_scene)):
        if given is not None and not scenes:
            raise ConfigError(f"{name} {given}: only with --scenes")
    options = MakeOptions(
        media=MediaOptions(
            short_side=short_side,
            fps=fps,
            gop=gop,
            crf=crf,
            audio_rate_hz=audio_rate,
            crop=parse_crop(crop),
            codec=codec,  # type: ignore[arg-type]  # checked where it arrives
            audio_codec=audio_codec,  # type: ignore[arg-type]
            motion=motion,
        ),
        max_count=max_count,
        max_bytes=max_size << 20,
        shuffle=None if keep_order else shuffle,
        subtitles=subtitles,
        merge_cues_seconds=merge_cues,
        windows=parse_windows(windows),
        scenes=(scene_detector or "pyav") if scenes else "",
        min_scene_seconds=0.5 if min_scene is None else min_scene,
        dedup=dedup,
        workers=workers,
        timeout_seconds=timeout,
        engine=engine,
        address=address,
    )
    if dry_run:
        for line in describe_plan(input, out, options):
            typer.echo(line)
        return
    with show_progress("shards", "samples") as progress:
        report = make_shards(input, out, options, progress=progress)
    for line in report.lines(out):
        typer.echo(line)


@app.command("import")
def import_(
    name: Annotated[
        str,
        typer.Argument(
            help="The data set, by the name of its protocol: msrvtt_1k_a, msrvtt_full, msvd, didemo, activitynet, "
            "lsmdc, vatex, audiocaps, clotho, vggsound, ucf101, hmdb51, k400, esc50 or urbansound8k."
        ),
    ],
    annotations: Annotated[
        Path,
        typer.Argument(
            help="Its public annotation file, such as MSRVTT_JSFUSION_test.csv; of ucf101 and hmdb51 the folder."
        ),
    ],
    media: Annotated[Path, typer.Argument(help="Folder of its media; folders below it are searched too.")],
    out: Annotated[Path, typer.Option(help="The table to write, a .jsonl, for `mmcl shards make`.")],
    split: Annotated[str, typer.Option(help="Which split; default: the one that is evaluated on.")] = "",
    fold: Annotated[int, typer.Option(help="Which of the official splits (ucf101, hmdb51: 1 to 3).")] = 1,
    only: Annotated[
        Path | None, typer.Option(help="A file whose lines begin with the items to take, such as msvd's test_list.txt.")
    ] = None,
) -> None:
    """Turn the annotations of a public data set, and a folder of its media, into a table for `make`.

    Items without media are left out, counted and named in a file beside the table; another names all classes.
    """
    from mmcl.shards.importers import import_annotations

    for line in import_annotations(name, annotations, media, out, split=split, fold=fold, only=only).lines():
        typer.echo(line)


@app.command()
def index(
    folder: Annotated[
        str,
        typer.Argument(
            help="A folder with WebDataset *.tar files, also in folders below it; or its URL (https://, s3://, gs://, "
            "hf://), or the tars by pattern, such as 'https://host/{000..099}.tar'."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Local folder for the files of the index; default: beside the tars.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads.")] = 4,
) -> None:
    """Index shards that another tool made (video2dataset, img2dataset, open_clip, webdataset), so that mmcl reads them.

    Writes index.json, sizes.json and one .members file per shard beside them; the tars are not changed.
    """
    from mmcl.shards.index import index_shards

    with show_progress("index", "shards") as progress:
        report = index_shards(folder, out=out, workers=workers, progress=progress)
    for problem in report.problems:
        typer.echo(problem, err=True)
    if report.ignored:
        typer.echo(
            "ignored: " + ", ".join(f"{count} × {why}" for why, count in sorted(report.ignored.items())), err=True
        )
    manifest = report.manifest
    typer.echo(
        f"{manifest.num_samples} samples in {manifest.num_shards} shards, {report.num_bytes / 1e6:.1f} MB, "
        f"{len(report.problems)} problems"
    )
    if out is not None:
        typer.echo(
            redact(f"{out}: put its files beside the tars, {folder.rpartition('/')[0] if '{' in folder else folder}")
        )


Shards = Annotated[str, typer.Argument(help="A folder of indexed shards, or its URL.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")]
Seed = Annotated[int, typer.Option(help="Seed of what is drawn at random.")]
Timeout = Annotated[
    float, typer.Option(max=1e6, help="Seconds per sample; then its process is ended and the sample named.")
]


@app.command()
def verify(
    shards: Shards,
    sample: Annotated[int | None, typer.Option(min=1, help="Decode so many, drawn at random; default: all.")] = None,
    seed: Seed = 0,
    checksums: Annotated[
        bool | None, typer.Option(help="Read whole tars and compare them with the index; default: without --sample.")
    ] = None,
    decoder: Annotated[str, typer.Option(help="What runs decode with: decord, pyav or torchcodec.")] = DEFAULT_DECODER,
    tolerance: Annotated[float, typer.Option(help="Seconds that picture, sound and JSON may differ by.")] = 0.5,
    quarantine: Annotated[Path | None, typer.Option(help="Add the bad samples to this JSONL file.")] = None,
    repair: Annotated[Path | None, typer.Option(help="Write the shards without them into this new folder.")] = None,
    workers: Workers = None,
    timeout: Timeout = 120.0,
) -> None:
    """Decode every sample to its end, as a run would, and name what cannot be used.

    Every sample is decoded in a child process: one that crashes or hangs the decoder is one line. Exit code 3 where
    anything was found.
    """
    from mmcl.shards.files import new_folder
    from mmcl.shards.verify import VerifyOptions, repair_shards, verify_shards, write_quarantine
    from mmcl.types import ConfigError

    options = VerifyOptions(
        sample=sample,
        seed=seed,
        checksums=checksums,
        decoder=decoder,  # type: ignore[arg-type]  # checked where it arrives
        tolerance_seconds=tolerance,
        workers=workers,
        timeout_seconds=timeout,
    )
    if repair is not None:
        if sample is not None:
            raise ConfigError("--repair keeps what was found good: it goes with all samples, not with --sample")
        new_folder(repair)  # refused now, not after hours of decoding
    with show_progress("verify", "checks") as progress:
        report = verify_shards(shards, options, progress=progress)
    for line in report.lines():
        typer.echo(line)
    if quarantine is not None:
        typer.echo(f"{quarantine}: {write_quarantine(quarantine, report)} keys added")
    if repair is not None:
        manifest = repair_shards(report, repair)
        typer.echo(f"{repair}: {manifest.num_samples} samples in {manifest.num_shards} shards")
    if not report.ok:
        raise typer.Exit(3)


@app.command()
def preview(
    shards: Shards,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("preview.html"),
    count: Annotated[int, typer.Option(min=1, help="Samples on the page, drawn at random.")] = 48,
    seed: Seed = 0,
    workers: Workers = None,
    timeout: Timeout = 60.0,
) -> None:
    """A page of frames, sound and captions of some samples; one file, opens anywhere."""
    from mmcl.shards.preview import preview_shards

    with show_progress("preview", "samples") as progress:
        page = preview_shards(
            shards, out, count=count, seed=seed, workers=workers, timeout_seconds=timeout, progress=progress
        )
    typer.echo(str(page))


@app.command()
def reshard(
    shards: Annotated[list[str], typer.Argument(help="Folders of indexed shards, or their URLs; several become one.")],
    out: Annotated[Path, typer.Option(help="A new folder; one folder below it per part.")],
    max_count: Annotated[int, typer.Option(min=1, help="Samples per shard at most.")] = 1_000,
    max_size: Annotated[int, typer.Option(min=1, help="Megabytes per shard at most.")] = 512,
    shuffle: Annotated[
        int | None, typer.Option(help="Seed of one random order over all samples; default: keep the order.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Parts and their shares, e.g. train=0.9,test=0.1; a group stays together.")
    ] = "",
    split_seed: Annotated[int, typer.Option(help="Seed of which group goes where.")] = 0,
    rename: Annotated[bool, typer.Option("--rename", help="Number keys that come twice instead of stopping.")] = False,
    attach: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER:MODALITY: rows that `mmcl embed` wrote become KEY.NAME.npy of their samples."),
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(help="A JSONL file of multiple-choice questions about clips; they become KEY.qa.json."),
    ] = None,
) -> None:
    """Write the same samples into other shards: of another size, shuffled over all of them, split, or merged.

    The old shards stay as they are.
    """
    from mmcl.shards.reshard import ReshardOptions, parse_attach, parse_split
    from mmcl.shards.reshard import reshard as run

    options = ReshardOptions(
        max_count=max_count,
        max_bytes=max_size << 20,
        shuffle=shuffle,
        split=parse_split(split),
        split_seed=split_seed,
        rename=rename,
        attach=parse_attach(attach or []),
        questions=questions,
    )
    with show_progress("reshard", "samples") as progress:
        report = run(shards, out, options, progress=progress)
    for line in report.lines():
        typer.echo(line)
