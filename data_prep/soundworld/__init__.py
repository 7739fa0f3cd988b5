"""SoundWorld: synthetic narrated egocentric video, in the folder layout of Ego4D's own CLI.

Run `python -m data_prep.soundworld --help`. `plan.py` decides what happens, `scene.py` draws it, `sound.py` synthesises
its sound, `annotate.py` narrates and labels it.
"""
