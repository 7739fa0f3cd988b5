"""One SoundWorld video from its plan to its file; what the worker processes run."""

import pathlib

from data_prep.soundworld import media, plan, scene, sound


def write_video(video: plan.Video, folder: str, ambience_files: list[str]) -> float:
    """Draws, synthesises and muxes one video unless it is there already; returns its length in seconds."""
    path = pathlib.Path(folder) / f"{video.uid}.mp4"
    if not path.exists():
        media.write_mp4(path, video, scene.render_frames(video), sound.synthesize(video, ambience_files))
    return video.duration_s
