"""SoundWorld's verbs, nouns and materials: what can happen, how it moves and what it could sound like.

The sounding rates follow the shape of Table 1 of the paper (wash 0.90 ... hold 0.09): a few extremes, most verbs near
the mean of 0.54 (17,693 of 33,000 labelled Ego4D clips), so that knowing the verb alone says little.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Material:
    """The timbre of a material. Apart from the pitch, one hears its decay and its brightness.

    Attributes:
      name: Material's name.
      fundamental_hz: Lowest mode of an object of size 1.
      ratios: Mode frequencies relative to the fundamental.
      decay_s: Time for the fundamental to fall by 60 dB; higher modes decay faster.
      tilt_db: Level change per octave of friction noise: how bright a rub sounds.
      noise: Share of an impact's energy that is a noise burst rather than modes, in [0, 1].
      grain_hz: Rate of the grains in friction (rough materials crackle), grains per second.
    """

    name: str
    fundamental_hz: float
    ratios: tuple[float, ...]
    decay_s: float
    tilt_db: float
    noise: float
    grain_hz: float


MATERIALS = {
    m.name: m
    for m in (
        Material("metal", 620.0, (1.0, 1.58, 2.24, 2.92, 4.15, 5.43, 6.79, 8.21), 0.90, -1.0, 0.10, 900.0),
        Material("glass", 1500.0, (1.0, 2.32, 4.25, 6.63, 8.9), 0.45, 0.5, 0.12, 1500.0),
        Material("ceramic", 1000.0, (1.0, 1.83, 2.76, 4.07, 5.6), 0.16, -1.5, 0.20, 700.0),
        Material("wood", 280.0, (1.0, 2.57, 4.4, 6.9), 0.085, -5.0, 0.30, 260.0),
        Material("plastic", 430.0, (1.0, 1.95, 3.4, 4.6), 0.06, -3.0, 0.45, 420.0),
        Material("paper", 900.0, (1.0, 2.1, 3.7), 0.018, 1.5, 0.92, 140.0),
        Material("cloth", 170.0, (1.0, 1.7), 0.025, -8.0, 0.88, 60.0),
        Material("food", 210.0, (1.0, 2.3, 3.1), 0.035, -6.0, 0.70, 180.0),
    )
}


@dataclasses.dataclass(frozen=True)
class Verb:
    """An action type.

    Attributes:
      name: Label in the verb taxonomy.
      forms: Surface forms as narrators write them (third person).
      motion: How hands and object move; see `motion.py`.
      rate_hz: (low, high) repetitions per second of the motion.
      sound: Kind of excitation → its weight: "impact" (at contacts); "friction", "liquid", "rustle" (driven by the speed).
      sounding_rate: Probability that a narrated action is both seen and heard.
      tool: What the right hand holds, or "".
      nouns: Nouns that the action is done to, most common first.
      weight: Relative frequency of the verb.
    """

    name: str
    forms: tuple[str, ...]
    motion: str
    rate_hz: tuple[float, float]
    sound: dict[str, float]
    sounding_rate: float
    tool: str
    nouns: tuple[str, ...]
    weight: float = 1.0


VERBS = (
    Verb("wash", ("washes", "rinses", "cleans"), "circle", (1.4, 2.2), {"liquid": 1.0, "friction": 0.3}, 0.90, "sponge",
         ("plate", "cup", "bowl", "spoon", "pan", "carrot", "bottle", "cloth"), 0.8),
    Verb("cut", ("cuts", "chops", "slices"), "strike", (2.6, 4.2), {"impact": 1.0}, 0.70, "knife",
         ("carrot", "onion", "bread", "paper", "cardboard", "cloth", "plank"), 1.3),
    Verb("stir", ("stirs", "mixes"), "circle", (1.2, 1.9), {"friction": 1.0, "impact": 0.35}, 0.58, "spoon",
         ("pot", "pan", "bowl", "cup", "bucket", "glass"), 1.1),
    Verb("wipe", ("wipes", "dusts"), "sweep", (0.9, 1.5), {"friction": 1.0}, 0.53, "cloth",
         ("plate", "table", "glass", "plank", "pan", "tile", "book"), 1.2),
    Verb("rub", ("rubs", "polishes"), "rub", (2.6, 4.0), {"friction": 1.0}, 0.46, "",
         ("cloth", "plank", "bottle", "tile", "carrot", "can", "book"), 0.9),
    Verb("scrape", ("scrapes", "grates"), "scrape", (1.2, 1.9), {"friction": 1.3}, 0.60, "scraper",
         ("pan", "plank", "carrot", "tile", "bread", "plate"), 0.9),
    Verb("hit", ("hits", "hammers", "strikes"), "strike", (1.3, 2.0), {"impact": 1.3}, 0.64, "hammer",
         ("plank", "can", "brick", "tile", "box", "bucket", "pot"), 0.9),
    Verb("tap", ("taps", "pats", "knocks"), "tap", (3.6, 5.2), {"impact": 0.8}, 0.54, "",
         ("glass", "table", "box", "book", "bucket", "brick", "bottle"), 0.9),
    Verb("shake", ("shakes", "rattles"), "shake", (2.8, 4.2), {"rustle": 0.7, "impact": 0.5}, 0.56, "",
         ("bottle", "box", "can", "bag", "cloth", "bucket"), 1.0),
    Verb("open", ("opens", "unlocks"), "open", (0.6, 0.9), {"impact": 0.8, "friction": 0.5}, 0.52, "",
         ("drawer", "box", "bottle", "book", "bag", "can", "pot"), 1.4),
    Verb("close", ("closes", "shuts"), "close", (0.6, 0.9), {"impact": 1.2, "friction": 0.3}, 0.66, "",
         ("drawer", "box", "book", "bottle", "pot", "bag"), 1.1),
    Verb("turn", ("turns", "rotates", "twists"), "turn", (0.9, 1.5), {"friction": 0.9, "impact": 0.3}, 0.46, "",
         ("bottle", "pan", "plate", "brick", "onion", "bowl"), 0.9),
    Verb("put", ("puts", "places", "sets"), "place", (0.7, 1.0), {"impact": 1.0}, 0.52, "",
         ("cup", "plate", "glass", "book", "box", "spoon", "pan", "brick", "onion", "can"), 1.8),
    Verb("drop", ("drops", "throws"), "drop", (0.8, 1.1), {"impact": 1.3}, 0.64, "",
         ("spoon", "carrot", "can", "plank", "brick", "bag", "cloth", "cup"), 0.9),
    Verb("pour", ("pours", "empties"), "pour", (0.7, 1.0), {"liquid": 1.0}, 0.58, "",
         ("bottle", "glass", "cup", "pot", "bucket", "bowl"), 1.0),
    Verb("fold", ("folds", "wraps"), "fold", (0.8, 1.3), {"rustle": 1.0}, 0.48, "",
         ("cloth", "paper", "bag", "cardboard", "shirt"), 1.0),
    Verb("tear", ("tears", "rips"), "tear", (0.9, 1.4), {"rustle": 1.3, "friction": 0.4}, 0.60, "",
         ("paper", "bag", "cloth", "bread", "cardboard"), 0.8),
    Verb("lift", ("lifts", "raises", "picks"), "lift", (0.7, 1.0), {"friction": 0.5, "impact": 0.4}, 0.34, "",
         ("cup", "pan", "box", "bottle", "book", "plank", "bag", "spoon"), 1.3),
    Verb("touch", ("touches", "feels"), "touch", (0.8, 1.1), {"friction": 0.5, "impact": 0.3}, 0.27, "",
         ("shirt", "plate", "table", "paper", "tile", "drawer"), 0.5),
    Verb("hold", ("holds", "grips"), "hold", (0.5, 0.8), {"rustle": 0.6}, 0.10, "",
         ("cup", "bag", "book", "glass", "shirt", "onion"), 0.6),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Noun:
    """An object: its material gives the timbre, its size the pitch, its shape and colour the looks.

    Attributes:
      name: Label in the noun taxonomy.
      forms: Surface forms as narrators write them.
      material: Key of `MATERIALS`.
      size: Relative size; mode frequencies scale with 1 / size.
      shape: How `scene.py` draws it.
      rgb: Typical colour; each instance differs.
    """

    name: str
    forms: tuple[str, ...]
    material: str
    size: float
    shape: str
    rgb: tuple[int, int, int]


NOUNS = (
    Noun("cup", ("cup", "mug"), "ceramic", 0.85, "cup", (232, 232, 236)),
    Noun("plate", ("plate", "dish"), "ceramic", 1.25, "disc", (240, 238, 228)),
    Noun("tile", ("tile", "slab"), "ceramic", 1.0, "square", (190, 120, 90)),
    Noun("glass", ("glass", "tumbler"), "glass", 0.9, "tumbler", (170, 215, 225)),
    Noun("bowl", ("bowl", "basin"), "glass", 1.4, "bowl", (120, 190, 215)),
    Noun("pan", ("pan", "skillet"), "metal", 1.2, "pan", (52, 54, 60)),
    Noun("pot", ("pot", "saucepan"), "metal", 1.6, "pot", (150, 155, 165)),
    Noun("spoon", ("spoon", "ladle"), "metal", 0.6, "spoon", (200, 204, 212)),
    Noun("can", ("can", "tin"), "metal", 0.8, "tumbler", (205, 50, 45)),
    Noun("plank", ("plank", "board"), "wood", 1.1, "bar", (196, 146, 88)),
    Noun("drawer", ("drawer", "cabinet"), "wood", 1.6, "drawer", (126, 82, 46)),
    Noun("table", ("table", "counter"), "wood", 2.0, "slab", (150, 110, 74)),
    Noun("bottle", ("bottle", "flask"), "plastic", 0.9, "bottle", (60, 130, 205)),
    Noun("bucket", ("bucket", "pail"), "plastic", 1.7, "bucket", (225, 120, 40)),
    Noun("box", ("box", "container"), "plastic", 1.2, "square", (70, 165, 90)),
    Noun("paper", ("paper", "sheet"), "paper", 1.0, "sheet", (248, 248, 244)),
    Noun("book", ("book", "notebook"), "paper", 1.3, "book", (130, 60, 150)),
    Noun("cardboard", ("cardboard", "carton"), "paper", 1.6, "bar", (180, 140, 96)),
    Noun("bag", ("bag", "packet"), "paper", 0.8, "bag", (222, 204, 60)),
    Noun("cloth", ("cloth", "towel"), "cloth", 1.0, "sheet", (215, 110, 150)),
    Noun("shirt", ("shirt", "garment"), "cloth", 1.3, "shirt", (70, 90, 170)),
    Noun("carrot", ("carrot", "vegetable"), "food", 0.7, "carrot", (240, 130, 30)),
    Noun("onion", ("onion", "shallot"), "food", 0.9, "ball", (178, 96, 130)),
    Noun("bread", ("bread", "loaf"), "food", 1.3, "loaf", (208, 158, 96)),
    Noun("brick", ("brick", "stone"), "ceramic", 1.8, "bar", (160, 72, 56)),
)  # fmt: skip

NOUN_INDEX = {noun.name: i for i, noun in enumerate(NOUNS)}


def pair_weights() -> list[tuple[int, int, float]]:
    """Returns (verb index, noun index, relative frequency) of every pair, by Zipf's law over each verb's nouns.

    The tail is long: the commonest fifth of the pairs makes up nearly half of all actions, the rarer half nearly a quarter.
    """
    pairs = []
    for v, verb in enumerate(VERBS):
        zipf = [1.0 / (rank + 1) for rank in range(len(verb.nouns))]
        total = sum(zipf)
        pairs += [(v, NOUN_INDEX[n], verb.weight * z / total) for n, z in zip(verb.nouns, zipf, strict=True)]
    return pairs
