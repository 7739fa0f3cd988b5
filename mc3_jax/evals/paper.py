"""The paper's results (SoundingActions, CVPR 2024), shown beside those measured here, on other data with smaller models."""

# Table 2, discovery: ROC-AUC and PR-AUC of audio-video (AV) and audio-language (AL).
DISCOVERY = {
    "Random": {"av": (0.500, 0.559), "al": (0.500, 0.559)},
    "CLAP": {"al": (0.637, 0.695)},
    "CM-ACC": {"av": (0.540, 0.590)},
    "CMC": {"av": (0.550, 0.601), "al": (0.635, 0.693)},
    "ImageBind": {"av": (0.554, 0.605), "al": (0.642, 0.685)},
    "w/o consensus": {"av": (0.563, 0.615), "al": (0.635, 0.694)},
    "w/o contrastive": {"av": (0.436, 0.493), "al": (0.584, 0.620)},
    "w/o align": {"av": (0.448, 0.507), "al": (0.464, 0.521)},
    "MC3": {"av": (0.598, 0.666), "al": (0.658, 0.715)},
}

# Table 3, retrieval: its "Recall" at 5 and 10, in percent. The Random row fits hits / relevant, the others fit mean hits.
RETRIEVAL = {
    "Random": {"v2a": (0.1, 0.1), "a2v": (0.1, 0.1), "l2a": (0.1, 0.1), "a2l": (0.1, 0.1)},
    "CLAP": {"l2a": (49.8, 87.6), "a2l": (34.0, 67.1)},
    "CM-ACC": {"v2a": (34.6, 63.5), "a2v": (30.9, 57.7)},
    "CMC": {"v2a": (36.5, 67.9), "a2v": (33.8, 63.7), "l2a": (44.1, 81.8), "a2l": (32.8, 64.3)},
    "ImageBind": {"v2a": (32.8, 61.5), "a2v": (29.7, 57.9), "l2a": (42.6, 76.5), "a2l": (30.6, 60.5)},
    "w/o consensus": {"v2a": (33.9, 63.0), "a2v": (30.0, 56.1), "l2a": (45.0, 84.7), "a2l": (32.9, 65.8)},
    "w/o contrastive": {"v2a": (3.3, 3.7), "a2v": (6.4, 12.5), "l2a": (3.1, 4.7), "a2l": (3.3, 8.0)},
    "w/o align": {"v2a": (10.0, 19.4), "a2v": (5.9, 11.8), "l2a": (11.6, 20.9), "a2l": (6.5, 12.6)},
    "MC3": {"v2a": (38.4, 72.8), "a2v": (34.4, 66.3), "l2a": (46.2, 88.5), "a2l": (37.5, 73.8)},
}

# Table 4, EPIC-Sounds: top-1 and top-5 in percent, mean class accuracy in percent, mAP, mAUC; L linear probe, F fine-tuned.
NUM_SOUND_CLASSES = 44
FIRST_SOUND_CLASSES = ("metal-only collision", "scrub / scrape / scour / wipe", "cut / chop")  # by class_id
CLASSIFICATION = {
    ("Random", ""): (7.71, 30.95, 2.29, 0.023, 0.500),
    ("ASF", "L"): (45.53, 79.33, 13.48, 0.172, 0.789),
    ("SSAST", "L"): (28.74, 64.84, 7.14, 0.079, 0.755),
    ("MC3", "L"): (42.44, 78.76, 12.79, 0.153, 0.818),
    ("ASF", "F"): (53.75, 84.54, 20.11, 0.254, 0.873),
    ("SSAST", "F"): (53.47, 84.56, 20.22, 0.235, 0.879),
    ("MC3", "F"): (55.97, 85.86, 21.65, 0.242, 0.885),
}
