"""Makes the file of one SoundWorld video from its plan; this is what the worker processes run."""

import pathlib

from data_prep.soundworld import media, plan, scene, sound


def write_video(video: plan.Video, folder: str, ambience_files: list[str]) -> float:
    """Draws, synthesises and muxes a video unless its file exists already; returns its length in seconds."""
    path = pathlib.Path(folder) / f"{video.uid}.mp4"
    if not path.exists():
        media.write_mp4(path, video, scene.render_frames(video), sound.synthesize(video, ambience_files))
    return video.duration_s
