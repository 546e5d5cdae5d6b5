"""Class names of the segmentation data sets, in label order: name k (from 1) is label k, label 0 is "other", ignored.

Sources. ADE20K_150: objectInfo150.txt of ADEChallengeData2016, first synonym. ADE20K_OBJECT_59, PASCAL_OBJECT_16 and
LIP_19: the authors' segmentation/mmseg/datasets/{ade_59object,pascal_16semantic,lip}.py. The authors remark that the 59
names may be wrong: they are in the order of the 150 except for "boat", so in the authors' own label maps the names from
"boat" to "swivel chair" may be one off. PASCAL_PART_193: the Pascal-Part devkit (part2ind.m), numbered families merged.
The authors' maps of the 193 and of the 209 parts come without names, so their label order is unknown. No mean over
classes depends on the order.
"""

from pathlib import Path

from utils import UserError

from .files import read_lines


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).split(", "))


ADE20K_150 = _names("""
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television, airplane, dirt track, apparel, pole, land, bannister, escalator,
ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool,
stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave,
pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan,
fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag""")
ADE20K_OBJECT_59 = _names("""
building, sky, tree, bed, windowpane, cabinet, person, door, table, plant, chair, car, sofa, shelf, house, armchair,
seat, fence, desk, wardrobe, lamp, bathtub, column, chest of drawers, sink, skyscraper, refrigerator, boat, stairs,
pool table, stairway, bookcase, blind, coffee table, toilet, stove, computer, swivel chair, bus, light, truck,
chandelier, airplane, ottoman, bottle, van, washer, stool, minibike, oven, microwave, dishwasher, screen, hood, sconce,
traffic light, fan, glass, clock""")
LIP_19 = _names("""
hat, hair, glove, sunglasses, upper-clothes, dress, coat, socks, pants, jumpsuits, scarf, skirt, face, left arm,
right arm, left leg, right leg, left shoe, right shoe""")
# Devkit names: l, r = left, right; f, b, h, c before a word = front, back, head, coach; u, l before arm, leg = upper,
# lower; ho = hoof, pa = paw, liplate = license plate.
_BUS = ("frontside leftside rightside backside roofside leftmirror rightmirror fliplate bliplate "
        "door wheel headlight window")
_CAT = "head leye reye lear rear nose torso neck lfleg lfpa rfleg rfpa lbleg lbpa rbleg rbpa tail"
_COW = ("head leye reye lear rear muzzle lhorn rhorn torso neck "
        "lfuleg lflleg rfuleg rflleg lbuleg lblleg rbuleg rblleg tail")
PASCAL_PARTS = {name: tuple(parts.split()) for name, parts in {
    "aeroplane": "body stern lwing rwing tail engine wheel",
    "bicycle": "fwheel bwheel saddle handlebar chainwheel headlight",
    "bird": "head leye reye beak torso neck lwing rwing lleg lfoot rleg rfoot tail",
    "bottle": "cap body", "bus": _BUS, "car": _BUS, "cat": _CAT, "cow": _COW,
    "dog": _CAT + " muzzle",
    "horse": _COW.replace("lhorn rhorn ", "") + " lfho rfho lbho rbho",
    "motorbike": "fwheel bwheel handlebar saddle headlight",
    "person": "head leye reye lear rear lebrow rebrow nose mouth hair torso neck "
              "llarm luarm lhand rlarm ruarm rhand llleg luleg lfoot rlleg ruleg rfoot",
    "pottedplant": "pot plant", "sheep": _COW,
    "train": "head hfrontside hleftside hrightside hbackside hroofside headlight "
             "coach cfrontside cleftside crightside cbackside croofside",
    "tvmonitor": "screen",
}.items()}
PASCAL_OBJECT_16 = tuple(PASCAL_PARTS)
PASCAL_PART_193 = tuple(f"{name} {part}" for name, parts in PASCAL_PARTS.items() for part in parts)

PARTIMAGENET_PARTS = {
    "quadruped": "head torso foot tail", "biped": "head torso hand foot tail", "fish": "head torso fin tail",
    "bird": "head torso wing foot tail", "snake": "head torso", "reptile": "head torso foot tail",
    "car": "body tire mirror", "bicycle": "head body seat tire", "boat": "body sail",
    "aeroplane": "head body wing engine tail", "bottle": "body mouth",
}

CLASS_NAMES = {
    "ade20k": ADE20K_150, "ade20k-object": ADE20K_OBJECT_59,
    "ade20k-part": tuple(f"class {label}" for label in range(1, 210)),  # only the label maps are published
    "pascal-object": PASCAL_OBJECT_16, "pascal-part": PASCAL_PART_193, "lip": LIP_19,
    # Of PartImageNet_Seg, name k, from 0, is label k; the names of the 158 objects do not come with the label maps.
    "partimagenet-object": tuple(f"class {label}" for label in range(158)),
    "partimagenet-part": tuple(f"{name} {part}" for name in PARTIMAGENET_PARTS
                               for part in PARTIMAGENET_PARTS[name].split()),
}


def class_names(dataset: str, root: Path | None = None) -> tuple[str, ...]:
    """A data set's class names in label order: from root/names.txt (of datasets.prepare, any number of them) where it
    exists, else from this file. PartImageNet's names.txt, in a folder that the parts share, holds the 158 objects. The
    user's own data set, "folder", has no other names than those of its names.txt. Raises UserError as read_names does.
    """
    path = root / "names.txt" if root else None
    if dataset != "folder" and (path is None or not path.is_file() or dataset == "partimagenet-part"):
        return CLASS_NAMES[dataset]
    return read_names(path)


def read_names(path: Path) -> tuple[str, ...]:
    """The lines of a file of class names. Raises UserError if it is missing or empty or repeats a name."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; it is a text file of class names, one a line")
    names = tuple(line.strip() for line in read_lines(path) if line.strip())
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path} is empty or holds a name twice; write each class name once, one a line")
    return names
