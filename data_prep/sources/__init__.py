"""Readers of annotations, one module for each layout.

They return `data_prep.narrations.Narration`s, or `data_prep.sounds.Sound`s for sounds with classes. Only `grid`, for videos
without annotations, has to open the media.
"""
