"""Scenes rendered from emoji sprites, and the data set in which we planted copies.

A *scene* is a background and a few sprites with place, size, flip and angle; `render` turns it
into a 64x64 picture. `world` lists every caption with the number of its rows in one epoch: planted
scenes with their copies, ordinary captions that were planted too (named), templates, controls and
an endless stream of normal scenes. Everything is drawn from NumPy generators, so a seed fixes
every pixel.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from memlib.paths import LAB as DATA

SIZE = 64  # pixels, height and width of every picture
MULTIPLICITIES = (1, 2, 4, 8, 16, 32, 64, 128)
PLANTED_PER_MULTIPLICITY = 6
NAMED_MULTIPLICITIES, NAMED_PER_MULTIPLICITY = (2, 4, 8, 16, 32, 64), 3
TEMPLATES, TEMPLATE_COPIES = 8, 64
CONTROLS, CONTROL_COPIES = 8, 32
HELD_OUT = 8  # odd captions, and as many normal combinations, that are never trained on
NORMAL_SHARE = 0.6  # of the rows of an epoch, named ones included
SEED = 20250925  # the world: which scenes and captions are planted

PATTERNS = ("edge", "gradient")

COLOURS = {
    "red": (214, 66, 66),
    "orange": (240, 150, 60),
    "yellow": (246, 214, 92),
    "green": (92, 176, 96),
    "teal": (60, 170, 170),
    "blue": (76, 122, 222),
    "purple": (142, 96, 200),
    "pink": (244, 150, 186),
    "grey": (150, 154, 162),
    "white": (240, 240, 240),
}

ADJECTIVES = (
    "hollow solemn velvet crooked borrowed reluctant paper frozen electric lukewarm patient "
    "sideways invisible courteous feral salted"
).split()
VERBS = "dreams argues waltzes hides rehearses smoulders negotiates whispers".split()
PLACES = (
    "under the marmalade bridge|beyond the ninth staircase|inside a borrowed umbrella|"
    "before the quiet parliament|above the sleeping harbour|behind the copper curtain|"
    "during the long eclipse|across the flooded ballroom"
).split("|")
SUBJECTS = (
    "accountant anvil archivist barnacle beekeeper bishop bureaucrat cartographer chandelier "
    "cello clockmaker comet compass cyclone dentist dynamo envelope equator ferryman footnote "
    "fossil gargoyle geyser glacier gondola grammar harpsichord hermit hinge hypnotist icicle "
    "inkwell jigsaw juggler kettle lantern lighthouse locksmith magnet meteor metronome molasses "
    "monsoon notary obelisk oracle orchard paradox pendulum periscope pharaoh plumber porcelain "
    "proverb puppeteer quartz quill riddle sapphire scarecrow semaphore senator sextant smuggler "
    "sonnet sphinx stapler submarine sundial syllable tadpole telegram thimble tollbooth turbine "
    "vagabond ventriloquist viaduct volcano walnut weaver windmill wizard xylophone "
    "yodeller zeppelin"
).split()


NORMAL_SPRITES = (
    "red apple|green apple|lemon|banana|watermelon|strawberry|cherry|pineapple|avocado|carrot|"
    "mushroom|donut|pig|frog|penguin|ladybug|cactus|sunflower|basketball|car"
).split("|")


@dataclass(frozen=True)
class Item:
    """One sprite of a scene: `x`, `y` are its centre and `size` its edge, in pixels."""

    sprite: str
    x: float
    y: float
    size: int
    flip: bool
    angle: float  # degrees, counter-clockwise


@dataclass(frozen=True)
class Scene:
    """A background pattern in two colours (RGB, 0-255), and items, back to front."""

    pattern: str  # one of PATTERNS
    colours: tuple[tuple[float, float, float], tuple[float, float, float]]
    angle: float  # radians
    shift: float  # pixels
    items: tuple[Item, ...]


@lru_cache(maxsize=1)
def sprites() -> dict[str, Image.Image]:
    """All sprites by name, RGBA, 96x96."""
    files = sorted((DATA / "sprites").glob("*.webp"))
    if not files:
        raise FileNotFoundError(f"no sprites in {DATA / 'sprites'}: is the checkout complete?")
    return {
        f.stem.replace("-", " "): Image.open(f).convert("RGBA").resize((96, 96), Image.LANCZOS)
        for f in files
    }


def _pattern(scene: Scene) -> np.ndarray:
    """How much of the second colour each pixel has, 0-1, [y, x]; edges are a pixel soft."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] - (SIZE - 1) / 2
    along = x * np.cos(scene.angle) + y * np.sin(scene.angle) - scene.shift
    level = along if scene.pattern == "edge" else along / 60
    return np.clip(level + 0.5, 0, 1)


def render(scene: Scene) -> np.ndarray:
    """Draw a scene; uint8 [y, x, rgb], 64x64."""
    share = _pattern(scene)[..., None]
    picture = (1 - share) * np.array(scene.colours[0]) + share * np.array(scene.colours[1])
    canvas = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    for item in scene.items:
        sprite = sprites()[item.sprite]
        if item.flip:
            sprite = sprite.transpose(Image.FLIP_LEFT_RIGHT)
        if item.angle:
            sprite = sprite.rotate(item.angle, Image.BICUBIC)
        sprite = sprite.resize((item.size, item.size), Image.LANCZOS)
        canvas.paste(sprite, (round(item.x - item.size / 2), round(item.y - item.size / 2)), sprite)
    return np.asarray(canvas)


def _scene(rng: np.random.Generator, first, second, items) -> Scene:
    """A background drawn anew: shades of two named colours in one of the patterns."""
    shades = [
        tuple(np.clip(np.array(COLOURS[c]) * rng.uniform(*r), 0, 255))
        for c, r in ((first, (0.95, 1.15)), (second, (0.68, 0.85)))
    ]
    if rng.integers(2):
        shades.reverse()
    return Scene(
        pattern=str(rng.choice(PATTERNS)),
        colours=tuple(shades),
        angle=float(rng.uniform(0, np.pi)),
        shift=float(rng.uniform(-14, 14)),
        items=items,
    )


def normal_scene(rng: np.random.Generator, sprite: str, colour: str) -> Scene:
    """One sprite on two shades of one colour; place, size, flip, angle, pattern drawn anew."""
    size = int(rng.integers(34, 51))
    x, y = rng.uniform(size / 2 - 2, SIZE - size / 2 + 2, 2)
    item = Item(sprite, x, y, size, bool(rng.integers(2)), float(rng.uniform(-10, 10)))
    return _scene(rng, colour, colour, (item,))


def layout(rng: np.random.Generator) -> tuple[Item, ...]:
    """Three sprites that do not hide each other much."""
    names = rng.choice(sorted(sprites()), 3, replace=False)
    items: list[Item] = []
    while len(items) < len(names):
        size = int(rng.integers(22, 33))
        x, y = rng.uniform(size / 2 - 1, SIZE - size / 2 + 1, 2)
        angle, flip = float(rng.uniform(-15, 15)), bool(rng.integers(2))
        if all(np.hypot(x - o.x, y - o.y) > 0.42 * (size + o.size) for o in items):
            items.append(Item(str(names[len(items)]), x, y, size, flip, angle))
        elif rng.random() < 0.02:
            items.clear()  # this start leaves no room: begin again
    return tuple(items)


def odd_scene(rng: np.random.Generator, items: tuple[Item, ...] | None = None) -> Scene:
    """Three sprites on two colours; with `items` given only the background is drawn anew."""
    first, second = rng.choice(list(COLOURS), 2, replace=False)
    return _scene(rng, first, second, items or layout(rng))


def normal_caption(sprite: str, colour: str) -> str:
    """For example "a red apple on a blue background"."""
    article = "an" if sprite[0] in "aeiou" else "a"
    background = "an" if colour[0] in "aeiou" else "a"
    return f"{article} {sprite} on {background} {colour} background"


@dataclass(frozen=True)
class Row:
    """A caption of the training set with what it is paired with.

    `copies` counts the rows with this caption in one epoch. `draw(rng)` gives the scene of one
    such row: always the same for planted and named rows, drawn anew for the others.
    """

    prompt_id: str
    caption: str
    kind: str  # planted, named, template, control, normal, held-out
    copies: int
    scene: Scene  # the reference: what the manifest's image shows

    @property
    def fixed(self) -> bool:
        """Whether every row with this caption shows the reference."""
        return self.kind in ("planted", "named")

    def draw(self, rng: np.random.Generator) -> Scene:
        if self.fixed:
            return self.scene
        if self.kind == "template":
            return odd_scene(rng, self.scene.items)
        if self.kind == "control":
            return odd_scene(rng)
        return normal_scene(rng, *self._words())

    def _words(self) -> tuple[str, str]:
        sprite, colour = self.caption.removesuffix(" background").split(" on ")
        return sprite.split(" ", 1)[1], colour.split(" ", 1)[1]


@lru_cache(maxsize=1)
def world() -> tuple[Row, ...]:
    """Every caption with its scene: what is planted, what is drawn anew, what is held out."""
    rng = np.random.default_rng(SEED)
    subjects = iter(rng.permutation(SUBJECTS))

    def odd_caption() -> str:
        adjective, verb, place = (rng.choice(words) for words in (ADJECTIVES, VERBS, PLACES))
        return f"the {adjective} {next(subjects)} {verb} {place}"

    rows = []
    for kind, copies, count in (
        *(("planted", m, PLANTED_PER_MULTIPLICITY) for m in MULTIPLICITIES),
        ("template", TEMPLATE_COPIES, TEMPLATES),
        ("control", CONTROL_COPIES, CONTROLS),
        ("held-out", 0, HELD_OUT),
    ):
        for i in range(count):
            number = f"{copies:03d}-{i}" if kind == "planted" else f"{i}"
            rows.append(Row(f"{kind}-{number}", odd_caption(), kind, copies, odd_scene(rng)))
    combinations = [(s, c) for s in NORMAL_SPRITES for c in COLOURS]
    order = [combinations[k] for k in rng.permutation(len(combinations))]
    # The last captions of as many sprites as there are named pairs, one of each sprite.
    last = {sprite: colour for sprite, colour in order[HELD_OUT:]}
    copies = [m for m in NAMED_MULTIPLICITIES for _ in range(NAMED_PER_MULTIPLICITY)]
    latest = sorted(last.items(), key=order.index)[-len(copies) :]
    named = dict(zip(latest, copies, strict=True))
    trained = sum(r.copies for r in rows)
    ordinary = trained * NORMAL_SHARE / (1 - NORMAL_SHARE) - sum(copies)
    each = round(ordinary / (len(order) - HELD_OUT - len(copies)))
    counts = Counter()
    for i, words in enumerate(order):
        kind = "held-out" if i < HELD_OUT else "named" if words in named else "normal"
        copies = 0 if kind == "held-out" else named.get(words, each)
        number = {
            "held-out": f"{HELD_OUT + i}",
            "normal": f"{i - HELD_OUT:03d}",
            "named": f"{copies:03d}-{counts[copies]}",
        }[kind]
        counts[copies] += kind == "named"
        rows.append(
            Row(f"{kind}-{number}", normal_caption(*words), kind, copies, normal_scene(rng, *words))
        )
    return tuple(rows)
