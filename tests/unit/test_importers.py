"""Annotations of public data sets, in miniature copies of their own formats, to tables, shards and a report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mmcl.evaluation.protocols import ClassificationProtocol, load_protocol, protocol_names
from mmcl.shards.importers import IMPORTERS, import_annotations
from mmcl.shards.inputs import read_rows
from mmcl.types import ConfigError


def as_json(value: object) -> str:
    return json.dumps(value)


MSRVTT = {
    "info": {"year": "2016"},
    "videos": [
        {"category": 9, "url": "https://x", "video_id": "video0", "start time": 1.0, "end time": 9.5, "split": "train"},
        {"category": 3, "url": "https://x", "video_id": "video7010", "start time": 0, "end time": 9, "split": "test"},
        {"category": 3, "url": "https://x", "video_id": "video7011", "start time": 0, "end time": 9, "split": "test"},
    ],
    "sentences": [
        {"caption": "a car is shown", "video_id": "video0", "sen_id": 0},
        {"caption": "a girl sings", "video_id": "video7010", "sen_id": 1},
        {"caption": "a band plays", "video_id": "video7011", "sen_id": 2},
        {"caption": "a girl, on stage", "video_id": "video7010", "sen_id": 3},
    ],
}
DIDEMO = [
    {
        "annotation_id": number,
        "description": text,
        "video": video,
        "times": [[0, 0], [0, 1]],
        "num_segments": 6,
        "dl_link": "https://x",
    }
    for number, (video, text) in enumerate(
        [
            ("54322086@N00_2408598493_274c77d26a.avi", "the dog jumps"),
            ("10015567@N08_3655084291_d8b58466fa.mov", "waves"),
            ("54322086@N00_2408598493_274c77d26a.avi", "it lies down "),
        ]
    )
]
ACTIVITYNET = {
    "v_uqiMw7tQ1Cc": {
        "duration": 55.15,
        "timestamps": [[0.28, 30.0], [31.0, 55.15]],
        "sentences": ["A weight lifting tutorial is given.", " The coach helps."],
    },
    "v_bXdq2zI1Ms0": {"duration": 73.1, "timestamps": [[0, 10.2]], "sentences": ["Three men are standing."]},
}
VATEX = [
    {"videoID": "G9zN5TTuGO4_000179_000189", "enCap": ["A man talks.", "Someone speaks."], "chCap": ["一个人"]},
    {"videoID": "_Kz0iVdOu3k_000017_000027", "enCap": ["Dogs run.", "Two dogs."], "chCap": ["狗"]},
]

# name: files of annotations; names of media; the row of the first item, less path and item; the item that is missing
CASES: dict[str, tuple[dict[str, str], list[str], dict[str, object], str]] = {
    "msrvtt_1k_a": (
        {
            "MSRVTT_JSFUSION_test.csv": "key,vid_key,video_id,sentence\n"
            "ret0,msr9770,video9770,a person is connecting something to system\n"
            'ret1,msr9771,video9771,"a little girl, who does gymnastics"\n'
        },
        ["TestVideo/video9770.mp4"],
        {"captions": ["a person is connecting something to system"], "split": "test"},
        "video9771",
    ),
    "msrvtt_full": (
        {"MSRVTT_data.json": as_json(MSRVTT)},
        ["video7010.mp4", "video0.mp4"],
        {"captions": ["a girl sings", "a girl, on stage"], "split": "test"},
        "video7011",
    ),
    "msvd": (
        {
            "AllVideoDescriptions.txt": "# MSR video descriptions\n\n"
            "mv89psg6zh4_33_46 a bird in a sink\nmv89psg6zh4_33_46 a faucet and a bird\n-4wsuPCjDBc_5_15 a squirrel\n"
        },
        ["YouTubeClips/mv89psg6zh4_33_46.avi"],
        {"captions": ["a bird in a sink", "a faucet and a bird"], "group": "mv89psg6zh4", "split": "test"},
        "-4wsuPCjDBc_5_15",
    ),
    "didemo": (
        {"test_data.json": as_json(DIDEMO)},
        ["54322086@N00_2408598493_274c77d26a.avi.mp4"],
        {"captions": ["the dog jumps it lies down"], "split": "test"},
        "10015567@N08_3655084291_d8b58466fa.mov",
    ),
    "activitynet": (
        {"val_1.json": as_json(ACTIVITYNET)},
        ["v_uqiMw7tQ1Cc.mp4"],
        {"captions": ["A weight lifting tutorial is given. The coach helps."], "split": "val"},
        "v_bXdq2zI1Ms0",
    ),
    "lsmdc": (
        {
            "LSMDC16_challenge_1000_publictect.csv": "1017_Bad_Santa_00.02.41.568-00.02.42.887\t00.02.41.568\t"
            '00.02.42.887\t00.02.41.568\t00.02.42.887\tSOMEONE says "no", and drinks.\n'
            "1041_This_is_40_00.03.13.000-00.03.15.000\t00.03.13\t00.03.15\t00.03.13\t00.03.15\tShe smiles.\n"
        },
        ["1017_Bad_Santa/1017_Bad_Santa_00.02.41.568-00.02.42.887.avi"],
        {"captions": ['SOMEONE says "no", and drinks.'], "group": "1017_Bad_Santa", "split": "test"},
        "1041_This_is_40_00.03.13.000-00.03.15.000",
    ),
    "vatex": (
        {"vatex_validation_v1.0.json": as_json(VATEX)},
        ["G9zN5TTuGO4_000179_000189.mp4"],
        {"captions": ["A man talks.", "Someone speaks."], "group": "G9zN5TTuGO4", "split": "test"},
        "_Kz0iVdOu3k_000017_000027",
    ),
    "audiocaps": (
        {
            "test.csv": "audiocap_id,youtube_id,start_time,caption\n"
            "103549,7fmOlUlwoNg,20,Constant rattling noise\n"
            '103548,6BJ455B1aAs,0,"A rocket, then a whistle"\n'
            "103547,7fmOlUlwoNg,20,A machine rattles\n"
        },
        ["Y7fmOlUlwoNg.wav"],
        {"captions": ["Constant rattling noise", "A machine rattles"], "group": "7fmOlUlwoNg", "split": "test"},
        "6BJ455B1aAs_0",
    ),
    "clotho": (
        {
            "clotho_captions_evaluation.csv": "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
            'Santa Motor.wav,"A machine whines, hard",b,c,d,e\nRadio Garble.wav,f,g,h,i,j\n'
        },
        ["evaluation/Santa Motor.wav"],
        {"captions": ["A machine whines, hard", "b", "c", "d", "e"], "split": "evaluation"},
        "Radio Garble.wav",
    ),
    "vggsound": (
        {
            "vggsound.csv": '---g-f_I2yQ,1,people marching,test\n--0PQM4-hqg,30,"waterfall, burbling",train\n'
            "-0BJJ3cCCwI,152,footsteps on snow,test\n"
        },
        ["---g-f_I2yQ_000001.mp4"],
        {"label": "people marching", "group": "---g-f_I2yQ", "split": "test"},
        "-0BJJ3cCCwI_152",
    ),
    "ucf101": (
        {
            "classInd.txt": "1 ApplyEyeMakeup\n2 YoYo\n3 TaiChi\n",
            "testlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\nYoYo/v_YoYo_g02_c03.avi\n",
            "testlist02.txt": "YoYo/v_YoYo_g09_c03.avi\n",
        },
        ["UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"],
        {"label": "apply eye makeup", "group": "v_ApplyEyeMakeup_g01", "split": "test"},
        "v_YoYo_g02_c03",
    ),
    "hmdb51": (
        {
            "brush_hair_test_split1.txt": "April_09_brush_hair_u_nm_np1_ba_goo_0.avi 2 \nx_brush_hair.avi 1 \n",
            "wave_test_split1.txt": "50_wave_u_cm_np1_fr_goo_30.avi 2 \ny_wave.avi 0 \n",
        },
        ["brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "y_wave.avi"],
        {"label": "brush hair", "split": "test"},
        "50_wave_u_cm_np1_fr_goo_30.avi",
    ),
    "k400": (
        {
            "validate.csv": "label,youtube_id,time_start,time_end,split\n"
            "javelin throw,--07WQ2iBlw,1,11,validate\nflipping pancake,--33Lscn6sk,4,14,validate\n"
        },
        ["javelin throw/--07WQ2iBlw_000001_000011.mp4"],
        {"label": "javelin throw", "group": "--07WQ2iBlw", "split": "val"},
        "--33Lscn6sk_4",
    ),
    "esc50": (
        {
            "esc50.csv": "filename,fold,target,category,esc10,src_file,take\n1-100032-A-0.wav,1,0,dog,True,100032,A\n"
            "1-100038-A-14.wav,1,14,chirping_birds,False,100038,A\n"
        },
        ["audio/1-100038-A-14.wav"],
        {"label": "chirping birds", "group": "100038", "fold": 1},
        "1-100032-A-0.wav",
    ),
    "urbansound8k": (
        {
            "UrbanSound8K.csv": "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
            "100032-3-0-0.wav,100032,0.0,0.317551,1,5,3,dog_bark\n100263-2-0-117.wav,100263,58.5,62.5,1,5,2,siren\n"
        },
        ["fold5/100032-3-0-0.wav"],
        {"label": "dog bark", "group": "100032", "fold": 5},
        "100263-2-0-117.wav",
    ),
}
FOLDERS = ("ucf101", "hmdb51")


@pytest.fixture
def data_set(tmp_path: Path, media_folder: Path) -> Callable[[str], tuple[Path, Path]]:
    """Writes the annotations of a case and its media, real clips; returns both places."""

    def write(name: str) -> tuple[Path, Path]:
        files, media, _, _ = CASES[name]
        for file, text in files.items():
            (tmp_path / "annotations").mkdir(exist_ok=True)
            (tmp_path / "annotations" / file).write_text(text, encoding="utf-8")
        for place, file in enumerate(media):
            (tmp_path / "media" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(media_folder / f"{('red', 'green')[place]}_1.mp4", tmp_path / "media" / file)
        return tmp_path / "annotations" / ("" if name in FOLDERS else next(iter(files))), tmp_path / "media"

    return write


def test_every_protocol_of_a_data_set_has_an_importer() -> None:
    assert {*IMPORTERS} == {*protocol_names()} - {"paired"} == {*CASES}
    for name, importer in IMPORTERS.items():
        protocol = load_protocol(name)
        assert protocol.split == (importer.splits or ("",))[0]
        assert isinstance(protocol, ClassificationProtocol) == ("label" in CASES[name][2])


@pytest.mark.parametrize("name", CASES)
def test_annotations_and_media_become_a_table(name: str, data_set, tmp_path: Path) -> None:
    _, media, wanted, missing = CASES[name]
    found = import_annotations(name, *data_set(name), tmp_path / "table.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert (found.items, found.missing) == (len(rows), (missing,))
    assert len(rows) == 1
    assert rows[0].pop("path") == f"media/{media[0]}"
    assert rows[0].pop("item")
    assert rows[0] == wanted
    assert (tmp_path / "table.missing.txt").read_text() == f"{missing}\n"
    assert any(missing in line and "table.missing.txt" in line for line in found.lines())
    row = read_rows(tmp_path / "table.jsonl")[0]
    assert row.problem is None
    assert list(row.captions) == wanted.get("captions", [])


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("vggsound", ["footsteps on snow", "people marching", "waterfall, burbling"]),
        ("ucf101", ["apply eye makeup", "yo yo", "tai chi"]),
        ("hmdb51", ["brush hair", "wave"]),
        ("esc50", ["chirping birds", "dog"]),
    ],
)
def test_all_classes_are_written_also_those_without_media(name: str, classes: list[str], data_set, tmp_path) -> None:
    import_annotations(name, *data_set(name), tmp_path / "table.jsonl")
    assert (tmp_path / "table.classes.txt").read_text().splitlines() == classes


MALFORMED = {
    "msrvtt_1k_a": ("ret2,msr1,video1\n", r"MSRVTT_JSFUSION_test\.csv, line 4: 3 fields where there should be 4"),
    "msvd": ("justaname\n", r"AllVideoDescriptions\.txt, line 6: not NAME_START_END"),
    "didemo": ("]", r"test_data\.json, line 1: not JSON: Extra data"),
    "lsmdc": ("a\tb\n", r"publictect\.csv, line 3: 2 fields between tabs"),
    "audiocaps": ("1,abc,soon,x\n", r"test\.csv, line 5: start_time='soon' is not a number of seconds"),
    "clotho": ('x.wav,"a\n', r"clotho_captions_evaluation\.csv: the row that begins on line 4: a quote is not closed"),
    "vggsound": ("x,1,dog,maybe\n", r"vggsound\.csv, line 4: not a video, a start, a class, and train or test"),
    "k400": ("dog,x,9,3,validate\n", r"validate\.csv, line 4: .*not after time_start"),
    "esc50": ("a.wav,one,0,dog,x,y,z\n", r"esc50\.csv, line 4: .*a fold that is no number"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_line_is_named_with_its_file_and_number(name: str, data_set, tmp_path: Path) -> None:
    annotations, media = data_set(name)
    line, message = MALFORMED[name]
    annotations.write_text(annotations.read_text(encoding="utf-8") + line, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        import_annotations(name, annotations, media, tmp_path / "table.jsonl")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "table.jsonl").exists()


def test_lists_of_folders_and_entries_of_json_are_named_too(data_set, tmp_path: Path) -> None:
    annotations, media = data_set("ucf101")
    (annotations / "testlist01.txt").write_text("YoYo/v_YoYo_g02_c03.avi\nNone/v_None_g01_c01.avi\n")
    with pytest.raises(ConfigError, match=r"testlist01\.txt, line 2: .*classInd\.txt"):
        import_annotations("ucf101", annotations, media, tmp_path / "table.jsonl")
    annotations, media = data_set("msrvtt_full")
    annotations.write_text(json.dumps({**MSRVTT, "sentences": [{"caption": 3, "video_id": "video0"}]}))
    with pytest.raises(ConfigError, match=r"MSRVTT_data\.json: sentences\[0\] has no 'caption'"):
        import_annotations("msrvtt_full", annotations, media, tmp_path / "table.jsonl")


def test_what_was_asked_for_must_be_there(data_set, tmp_path: Path) -> None:
    annotations, media = data_set("msvd")
    out = tmp_path / "table.jsonl"
    (tmp_path / "raw-captions.pkl").write_bytes(b"")
    (tmp_path / "list.txt").write_text("nobody_1_2\nnothing_1_2\n")
    (tmp_path / "empty").mkdir()
    for wrong, arguments, options in (
        (r"importer: unknown name 'mvsd' \(did you mean 'msvd'\?\)", ("mvsd", annotations, media, out), {}),
        (r"raw-captions\.pkl: a pickle can run code", ("msvd", tmp_path / "raw-captions.pkl", media, out), {}),
        (r"--split dev: msvd has test, train, val", ("msvd", annotations, media, out), {"split": "dev"}),
        (r"--fold 2: msvd has 1", ("msvd", annotations, media, out), {"fold": 2}),
        (r"nothing_1_2 \(line 2\): not in the", ("msvd", annotations, media, out), {"only": tmp_path / "list.txt"}),
        (r"empty: holds none of the 2 items, such as", ("msvd", annotations, tmp_path / "empty", out), {}),
        (r"--out .*table\.csv: the table is JSONL", ("msvd", annotations, media, tmp_path / "table.csv"), {}),
    ):
        with pytest.raises(ConfigError, match=wrong):
            import_annotations(*arguments, **options)


def test_a_list_chooses_items_and_two_files_of_one_name_are_said(data_set, tmp_path: Path) -> None:
    annotations, media = data_set("msvd")
    (tmp_path / "test_list.txt").write_text("mv89psg6zh4_33_46\n")
    (media / "again").mkdir()
    shutil.copy(media / "YouTubeClips/mv89psg6zh4_33_46.avi", media / "again/mv89psg6zh4_33_46.mp4")
    found = import_annotations("msvd", annotations, media, tmp_path / "table.jsonl", only=tmp_path / "test_list.txt")
    assert (found.items, found.missing, found.doubtful) == (1, (), ("mv89psg6zh4_33_46",))
    assert any("several files of one name" in line for line in found.lines())
    assert not (tmp_path / "table.missing.txt").exists()
