"""Records the arcade games of the ``ale-py`` package as ordinary MP4 files: game footage with sound, not filmed video.

Each game runs in a process of its own, because some games end the process that loads them.
"""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import av
import numpy as np

from mmcl.hashing import hash64, text_hash
from mmcl.types import ConfigError, RunError

FRAMES_HZ = 60
PICTURES_HZ = 20
AUDIO_HZ = 30_720
AUDIO_PER_FRAME = AUDIO_HZ // FRAMES_HZ
STORED_AUDIO_HZ = 32_000
"""AAC and most players want a standard rate"""
HOLD_FRAMES = 8
"""a random action is held this long: at 60 new actions a second nothing would move"""
HELD_OUT = (
    "battle_zone",
    "berzerk",
    "chopper_command",
    "entombed",
    "fishing_derby",
    "galaxian",
    "keystone_kapers",
    "mario_bros",
    "qbert",
    "venture",
    "wizard_of_wor",
    "yars_revenge",
)
"""the games never trained on: of those that run, the 12 with the smallest ``text_hash("held out " + game)``"""

# What underscores alone do not make readable.
_CAPTIONS = {
    "atlantis2": "atlantis 2",
    "darkchambers": "dark chambers",
    "earthworld": "earth world",
    "et": "e.t.",
    "hero": "h.e.r.o.",
    "jamesbond": "james bond",
    "koolaid": "kool-aid man",
    "mr_do": "mr. do",
    "ms_pacman": "ms. pac-man",
    "pacman": "pac-man",
    "pitfall2": "pitfall 2",
    "qbert": "q*bert",
    "riverraid": "river raid",
    "tic_tac_toe_3d": "3d tic-tac-toe",
    "trondead": "tron deadly discs",
    "up_n_down": "up 'n down",
    "yars_revenge": "yars' revenge",
}


@dataclass(frozen=True, slots=True)
class Recording:
    """One game, and what came of it."""

    game: str
    caption: str
    subset: str
    """``known`` or ``zero_shot`` (never trained on)"""
    train: Path | None = None
    test: Path | None = None
    train_has_sound: bool = False
    test_has_sound: bool = False
    skipped: str = ""
    """why there is no recording; empty: there is one"""

    @property
    def failed(self) -> bool:
        return bool(self.skipped)

    @property
    def silent(self) -> bool:
        """A recording of it has no sound."""
        return not self.failed and not (self.test_has_sound and (self.train is None or self.train_has_sound))


@dataclass(frozen=True, slots=True)
class _Take:
    game: str
    split: str
    path: Path
    seed: int
    frames: int


def caption_of(game: str) -> str:
    """The name of a game as people write it.

    >>> caption_of("space_invaders"), caption_of("riverraid")
    ('space invaders', 'river raid')
    """
    return _CAPTIONS.get(game, game.replace("_", " "))


def list_games() -> list[str]:
    """All games of the installed ``ale-py``, sorted. Raises ConfigError where the package is missing."""
    try:
        from ale_py import roms
    except ImportError as error:
        raise ConfigError("recording games needs ale-py: pip install 'mmcl[demo]'") from error
    return sorted(roms.get_all_rom_ids())


def record_games(
    out: Path,
    *,
    games: Sequence[str] | None = None,
    seed: int = 0,
    train_seconds: float = 16.0,
    test_seconds: float = 6.0,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Recording]:
    """Records ``games`` (default: all) under ``out/train`` and ``out/test`` and writes ``out/clips.csv``.

    A game of ``HELD_OUT`` gets a test recording only. Files that are there already are kept, so an interrupted call
    goes on where it stopped; the same seed gives the same pixels and sound. At most ``workers`` games (default: one per
    core) run at a time; ``progress(done, total, game)`` is called once per game that was run. A game that cannot be run
    is named in its ``Recording`` and left out of the table; a silent recording has no audio stream.

    Raises:
        ConfigError: an unknown game, or a folder that holds recordings made with other settings.
        RunError: nothing could be written, or no game ran.
    """
    listed = list_games()
    chosen = listed if games is None else list(dict.fromkeys(games))
    unknown = sorted(set(chosen) - set(listed))
    if unknown:
        raise ConfigError(f"unknown game {unknown[0]!r}; `ale-py` has: {', '.join(listed)}")
    if not chosen:
        raise ConfigError("no games to record")
    if min(train_seconds, test_seconds) < 1:
        raise ConfigError(f"recordings last at least one second, got {train_seconds} and {test_seconds}")
    out = Path(out)
    _keep_settings(out, {"seed": seed, "train_seconds": train_seconds, "test_seconds": test_seconds})
    seconds = {"train": train_seconds, "test": test_seconds}
    takes = {
        game: [
            _Take(game, split, out / split / f"{game}.mp4", seed, round(seconds[split] * FRAMES_HZ))
            for split in (("test",) if game in HELD_OUT else ("train", "test"))
        ]
        for game in chosen
    }
    failed: dict[str, str] = {}
    missing = {game: [take for take in each if not take.path.exists()] for game, each in takes.items()}
    todo = {game: each for game, each in missing.items() if each}
    for done, (game, problem) in enumerate(_run_each(todo, workers), start=1):
        if problem:
            failed[game] = problem
        if progress:
            progress(done, len(todo), game)
    recordings = [_describe(game, takes[game], failed.get(game, "")) for game in chosen]
    if all(recording.skipped for recording in recordings):
        raise RunError(f"no game could be recorded; {chosen[0]}: {failed[chosen[0]]}")
    _write_table(out / "clips.csv", recordings)
    return recordings


def _keep_settings(out: Path, settings: dict[str, float]) -> None:
    """Notes the settings in the folder; recordings of other settings are never mixed with these."""
    path = out / "recording.json"
    try:
        for split in ("train", "test"):
            (out / split).mkdir(parents=True, exist_ok=True)
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found != settings:
                raise ConfigError(f"{out} holds recordings of {found}, asked for {settings}: take another folder")
        else:
            _write_text(path, json.dumps(settings) + "\n")
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror}") from error


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _write_table(path: Path, recordings: Sequence[Recording]) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["path", "caption", "split", "group", "subset"])
            for recording in recordings:
                for split, clip in (("train", recording.train), ("test", recording.test)):
                    if clip is not None:
                        name = clip.relative_to(path.parent).as_posix()
                        table.writerow([name, recording.caption, split, recording.game, recording.subset])
        part.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error


def _describe(game: str, takes: Sequence[_Take], problem: str) -> Recording:
    subset = "zero_shot" if game in HELD_OUT else "known"
    if problem:
        return Recording(game, caption_of(game), subset, skipped=problem)
    paths = {take.split: take.path for take in takes}
    sound = {split: _has_sound(path) for split, path in paths.items()}
    return Recording(
        game,
        caption_of(game),
        subset,
        train=paths.get("train"),
        test=paths.get("test"),
        train_has_sound=sound.get("train", False),
        test_has_sound=sound.get("test", False),
    )


def _has_sound(path: Path) -> bool:
    with av.open(str(path)) as container:
        return bool(container.streams.audio)


def _context() -> BaseContext:
    """Processes start as forks of a clean server that has imported this module once, where the platform has that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _run_each(todo: dict[str, list[_Take]], workers: int | None) -> Iterator[tuple[str, str]]:
    """Yields (game, problem or "") as each game's process ends; at most ``workers`` run at a time."""
    context: Any = _context()
    limit = workers or os.cpu_count() or 1
    waiting = list(todo.items())[::-1]
    running: dict[int, tuple[str, Any, Connection]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                game, takes = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_record_game, args=(takes, sender), daemon=True)
                process.start()
                sender.close()
                running[process.sentinel] = (game, process, receiver)
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                game, process, receiver = running.pop(sentinel)
                process.join()
                yield game, _outcome(receiver, process.exitcode)
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.join()


def _outcome(receiver: Connection, exit_code: int | None) -> str:
    """What a finished process said; one that said nothing was ended by its game."""
    with receiver:
        if not receiver.poll():
            return f"the game ended its process (exit code {exit_code})"
        try:
            kind, message = receiver.recv()
        except EOFError:
            return f"the game ended its process (exit code {exit_code})"
    if kind == "os_error":
        raise RunError(f"cannot record: {message}")
    return str(message)


def _record_game(takes: Sequence[_Take], sender: Connection) -> None:
    """The process of one game. Ctrl-C is its parent's business, and what a dying game prints is nobody's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    try:
        for take in takes:
            _record(take)
        sender.send(("done", ""))
    except OSError as error:
        sender.send(("os_error", f"{error.strerror or error}: {takes[0].path}"))
    except Exception as error:  # any other trouble is this game's own: it is named and left out
        sender.send(("failed", f"{type(error).__name__}: {error}"))
    finally:
        sender.close()


def _record(take: _Take) -> None:
    pictures, audio = play(take.game, seed=take.seed, split=take.split, frames=take.frames)
    part = take.path.with_name(f".{take.path.name}.part")
    try:
        write_mp4(part, pictures, audio)
        part.replace(take.path)
    finally:
        part.unlink(missing_ok=True)


def play(game: str, *, seed: int, split: str, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Plays ``frames`` emulator frames with random actions that are a pure function of (seed, game, split, frame).

    Returns pictures uint8 ``(T, H, W, 3)`` at ``PICTURES_HZ`` and sound float32 ``(S,)`` in [−1, 1] at ``AUDIO_HZ``.
    """
    from ale_py import ALEInterface, LoggerMode, roms

    words = (seed, text_hash(game), text_hash(split))
    ALEInterface.setLoggerMode(LoggerMode.Error)
    emulator = ALEInterface()
    emulator.setBool("sound_obs", True)  # before the ROM is loaded
    emulator.setInt("random_seed", int(hash64(*words)) & 0x7FFFFFFF)
    emulator.setFloat("repeat_action_probability", 0.0)
    emulator.loadROM(roms.get_rom_path(game))
    actions = emulator.getMinimalActionSet()
    choices = hash64(*words, np.arange(frames) // HOLD_FRAMES) % np.uint64(len(actions))
    every = FRAMES_HZ // PICTURES_HZ
    height, width = emulator.getScreenDims()
    pictures = np.empty((math.ceil(frames / every), height, width, 3), dtype=np.uint8)
    audio = np.empty((frames, AUDIO_PER_FRAME), dtype=np.uint8)
    for frame in range(frames):
        emulator.act(actions[int(choices[frame])])
        audio[frame] = emulator.getAudio()
        if frame % every == 0:
            pictures[frame // every] = emulator.getScreenRGB()
        if emulator.game_over():
            emulator.reset_game()
    return pictures, (audio.reshape(-1).astype(np.float32) - 128) / 128


def write_mp4(path: Path, pictures: np.ndarray, audio: np.ndarray) -> None:
    """H.264 and AAC in MP4, from what ``play`` returns. Constant sound is silence: such a file gets no audio stream."""
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=PICTURES_HZ)
        video.height, video.width = pictures.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1  # one process per game uses the cores already
        video.options = {"preset": "veryfast", "crf": "20", "g": str(PICTURES_HZ)}
        sound = None
        if np.ptp(audio) > 0:
            sound = container.add_stream("aac", rate=STORED_AUDIO_HZ, layout="mono")
            sound.bit_rate = 96_000
            sound.options = {"aac_coder": "fast"}  # the default search takes four times the rest of the recording
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, PICTURES_HZ)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if sound is not None:
            resampler = av.AudioResampler(format="fltp", layout="mono", rate=STORED_AUDIO_HZ)
            wave = av.AudioFrame.from_ndarray(audio[None], format="fltp", layout="mono")
            wave.sample_rate, wave.pts, wave.time_base = AUDIO_HZ, 0, Fraction(1, AUDIO_HZ)
            for piece in [*resampler.resample(wave), *resampler.resample(None)]:
                container.mux(sound.encode(piece))
            container.mux(sound.encode(None))
