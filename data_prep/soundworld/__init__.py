"""SoundWorld: synthetic narrated egocentric video, in files as Ego4D's own CLI lays them out.

Run `python -m data_prep.soundworld --help`. `plan.py` decides what happens, `scene.py` draws it, `sound.py` makes it
heard, `annotate.py` narrates and labels it.
"""
