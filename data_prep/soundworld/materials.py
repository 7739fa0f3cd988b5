"""Can materials be told apart by ear alone? `python -m data_prep.soundworld.materials` prints a random forest's accuracy.

Each action's sound is taken alone and without reverberation. The forest sees the means and standard deviations of its MFCCs
and is tested on objects that it was not trained on, each with its own timbre.
"""

import argparse

import librosa
import numpy as np

from data_prep.soundworld import plan, sound, taxonomy
from data_prep.soundworld.voices import RATE_HZ


def isolated_sounds(num_videos: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (features [n, 40], material names [n]) of every action that sounds undrowned; each has an object of its own.

    Args:
      num_videos: Number of videos whose actions are taken.
      seed: Seed of the world.
    """
    features, names = [], []
    for index in range(num_videos):
        video = plan.plan_video(seed, index, 60.0, 112)
        for segment in video.segments:
            if segment.action_db is not None and not segment.drowned:
                wave = sound.isolated_action(segment).astype(np.float32)
                mfcc = librosa.feature.mfcc(y=wave, sr=RATE_HZ, n_mfcc=20)
                features.append(np.concatenate([mfcc.mean(1), mfcc.std(1)]))
                names.append(taxonomy.NOUNS[segment.noun].material)
    return np.array(features), np.array(names)


def held_out_accuracy(num_videos: int, seed: int) -> tuple[float, float]:
    """Returns the forest's accuracy on the second half of the sounds, and that of always answering the commonest material."""
    from sklearn.ensemble import RandomForestClassifier  # in the `test` extra; nothing else in data_prep needs it

    features, names = isolated_sounds(num_videos, seed)
    half = len(names) // 2
    forest = RandomForestClassifier(300, n_jobs=-1, random_state=0).fit(features[:half], names[:half])
    commonest = np.unique(names[half:], return_counts=True)[1].max() / (len(names) - half)
    return float((forest.predict(features[half:]) == names[half:]).mean()), float(commonest)


def main(argv: list[str] | None = None) -> None:
    """Prints the forest's accuracy and that of the commonest material."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.soundworld.materials", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--videos", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    accuracy, commonest = held_out_accuracy(args.videos, args.seed)
    print(f"material from isolated sound: accuracy {accuracy:.3f}, commonest material {commonest:.3f}, "
          f"{len(np.unique([n.material for n in taxonomy.NOUNS]))} materials")  # fmt: skip


if __name__ == "__main__":
    main()
