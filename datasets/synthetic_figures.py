"""The articulated figures of the synthetic data set: how a body of each species is put together, and nothing else.

A figure is a list of tubes in the order of painting, far limbs first. It faces right, y points down, its body is about
1 long; angles are in degrees and 90 is down. Joint angles, lengths and widths are drawn anew for every figure.
"""

import math
import random
from typing import NamedTuple

PART_NAMES = ("head", "eye", "ear", "mouth", "neck", "torso", "arm", "hand", "wing", "fin", "leg", "foot", "tail")


class Shape(NamedTuple):
    """A tube: cross-sections (x, y, nx, ny) along a spine, from (x - nx, y - ny) to (x + nx, y + ny); round ends."""
    part: int  # label in part_mask, 0 for clutter
    sections: list[tuple[float, float, float, float]]
    far: bool = False  # on the far side of the body: darker
    keypoint: str = ""
    at: float = 0.5  # where along the spine the keypoint lies, 0 to 1
    figure: int = -1  # -1 for clutter


class Dice:
    """Chance from random(), whose values for a seed Python promises to keep, and randbytes(), unchanged since 3.9."""

    def __init__(self, seed: int):
        generator = random.Random(seed)
        self.random, self.bytes = generator.random, generator.randbytes

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def whole(self, low: int, high: int) -> int:
        """low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, options):
        return options[self.whole(0, len(options) - 1)]


def walk(start, angle, *steps):
    """The joints of a chain, start included; a step is (length, bend before it)."""
    points = [start]
    for length, bend in steps:
        angle += bend
        x, y = points[-1]
        points.append((x + length * math.cos(math.radians(angle)), y + length * math.sin(math.radians(angle))))
    return points


def tube(part, points, radii, **options):
    """The shape along two or more points with half widths radii."""
    sections = []
    for i, ((x, y), radius) in enumerate(zip(points, radii, strict=True)):
        (x0, y0), (x1, y1) = points[max(i - 1, 0)], points[min(i + 1, len(points) - 1)]
        scale = radius / math.sqrt((x1 - x0) ** 2 + (y1 - y0) ** 2)
        sections.append((x, y, (y0 - y1) * scale, (x1 - x0) * scale))
    return Shape(PART_NAMES.index(part) + 1 if part else 0, sections, **options)


def oval(part, start, angle, length, radius, **options):
    """The ellipse that begins at start and goes on for length in the direction of angle."""
    # Twelve equal turns of the circle, stretched.
    steps, profile = (0.067, 0.183, 0.25, 0.25, 0.183, 0.067), (0.06, 0.5, 0.866, 1.0, 0.866, 0.5, 0.06)
    points = walk(start, angle, *[(length * share, 0) for share in steps])
    return tube(part, points, [radius * share for share in profile], **options)


def limb(part, start, angle, bones, far=False, keypoints=("", "")):
    """Two tubes, of bones (length, bend before it, radius where it starts, where it ends), and the keypoints at their
    starts. Returns the shapes, the tip, the last angle."""
    shapes = []
    for (length, bend, *radii), keypoint in zip(bones, keypoints, strict=True):
        angle += bend
        points = walk(start, angle, (length, 0))
        shapes.append(tube(part, points, radii, far=far, keypoint=keypoint, at=0.05))
        start = points[1]
    return shapes, start, angle


def fan(part, start, angles, lengths, radii, far=False, **options):
    """Rays (feathers, toes, fingers) from one point. The options go to the last, which is painted over the others."""
    rays = [tube(part, walk(start, angle, (0.55 * length, 0), (0.45 * length, 0)), radii, far=far)
            for angle, length in zip(angles, lengths, strict=True)]
    return rays[:-1] + [rays[-1]._replace(**options)]


def spread(first, last, count):
    return [first + (last - first) * i / (count - 1) for i in range(count)]


def eye(centre, radius):
    x, y = centre
    return oval("eye", (x - radius, y), 0, 2 * radius, radius, keypoint="eye")


def biped(dice):
    lean, build, turn = dice.between(-25, 30), dice.between(0.75, 1.35), dice.between(0, 0.07)
    spine = walk((0, 0), -90 + lean, (0.15, 0), (0.17, dice.between(-15, 15)))
    chest = spine[-1]

    def arm(far):
        shoulder = (chest[0] + (turn if far else -turn), chest[1] + 0.015)
        thick = 0.03 * build
        bones = [(0.17, dice.between(-150, 60), 1.2 * thick, thick), (0.15, -dice.between(0, 125), thick, 0.8 * thick)]
        shapes, wrist, angle = limb("arm", shoulder, 90 + lean, bones, far=far)
        fingers = dice.whole(3, 4)
        shapes += fan("hand", wrist, [angle + bend for bend in spread(-55, 35, fingers)], [0.095] * fingers,
                      (0.014, 0.013, 0.01), far=far)
        return [*shapes, oval("hand", wrist, angle, 0.07, 0.03, far=far, keypoint="" if far else "hand")]

    def leg(far):
        hip = (0.7 * (turn if far else -turn), 0.01)
        thick = 0.042 * build
        bones = [(0.23, dice.between(-65, 35), 1.2 * thick, thick), (0.22, dice.between(0, 85), thick, 0.6 * thick)]
        shapes, ankle, angle = limb("leg", hip, 90 + lean / 3, bones, far=far, keypoints=("", "" if far else "knee"))
        heel = walk(ankle, angle + dice.between(75, 105), (0.03, 0))[1]
        foot = walk(ankle, angle - dice.between(75, 105), (0.1, 0))
        return [*shapes, tube("foot", (heel, *foot), (0.026, 0.03, 0.02), far=far,
                              keypoint="" if far else "foot", at=0.6)]

    tilt = -90 + lean + dice.between(-25, 25)
    chin = walk(chest, tilt, (0.085, 0))[1]
    size, face = dice.between(0.85, 1.25), tilt + 90
    head = walk(chin, tilt, (0.085 * size, 0))[1]
    jaw = walk(head, face, (0.055 * size, 0), (0.035 * size, 90))[2]
    lips = walk(jaw, face + dice.between(-15, 30), (dice.between(0.03, 0.06) * size, 0))[1]
    return [
        *arm(True), *leg(True), tube("neck", (chest, chin), (0.034 * build, 0.034 * build)),
        tube("torso", spine, (0.075 * build, 0.066 * build, 0.09 * build)), *leg(False),
        tube("mouth", (jaw, lips), (0.028 * size, 0.016 * size), keypoint="mouth", at=1),
        oval("head", chin, tilt, 0.19 * size, 0.08 * size),
        oval("ear", walk(head, face, (-0.025 * size, 0))[1], tilt + dice.between(-25, 10),
             dice.between(0.05, 0.09) * size, 0.024 * size, keypoint="ear"),
        eye(walk(head, face, (0.045 * size, 0), (0.015 * size, -90))[2], 0.021 * size), *arm(False),
    ]


def quadruped(dice):
    length, build, tall = dice.between(0.42, 0.62), dice.between(0.75, 1.3), dice.between(0.13, 0.24)
    spine = walk((0, 0), dice.between(-10, 10), (length / 2, 0), (length / 2, dice.between(-20, 20)))
    rump, _, chest = spine

    def leg(hind, far):
        x, y = rump if hind else chest
        hip = (x + (0.03 if hind else -0.03) + (0.03 if far else -0.03), y + 0.04)
        swing, bend = dice.between(-40, 25), dice.between(5, 60)
        if not hind:
            swing, bend = -swing, -bend
        thick = (0.045 if hind else 0.036) * build
        bones = [(tall, swing, 1.3 * thick, 0.8 * thick), (tall, bend, 0.8 * thick, 0.55 * thick)]
        named = not (hind or far)
        shapes, ankle, angle = limb("leg", hip, 90, bones, far=far, keypoints=("", "knee" if named else ""))
        foot = walk(ankle, angle - dice.between(50, 80), (-0.02, 0), (0.075, 0))[1:]
        return [*shapes, tube("foot", foot, (0.03, 0.024), far=far, keypoint="foot" if named else "")]

    throat = walk((chest[0], chest[1] - 0.03), -dice.between(15, 80), (dice.between(0.06, 0.2), 0),
                  (dice.between(0.06, 0.2), dice.between(-10, 25)))
    size, face = dice.between(0.85, 1.3), dice.between(-10, 50)
    back = walk(throat[-1], face, (-0.05 * size, 0))[1]
    head = walk(back, face, (0.09 * size, 0))[1]
    snout = walk(head, face, (0.03 * size, 0), (0.02 * size, 90), (dice.between(0.07, 0.16) * size, -90))[2:]
    crown = walk(back, face, (0.035 * size, 0), (0.05 * size, -90))[2]
    ear_angle, ear_length = face - dice.between(70, 220), dice.between(0.07, 0.17) * size
    curl, bones = dice.between(-28, 28), dice.whole(4, 6)
    tail = walk((rump[0] - 0.03, rump[1] - 0.05), dice.between(110, 250),
                *[(dice.between(0.25, 0.5) / bones, curl)] * bones)
    tail_radii = [0.028 * build * share for share in spread(1, dice.pick((0.5, 1.0, 2.0)), bones + 1)]
    belly = dice.between(0.1, 0.14) * build
    return [
        *leg(True, True), *leg(False, True), tube("tail", tail, tail_radii, keypoint="tail", at=0.9),
        oval("ear", crown, ear_angle + 25, ear_length, 0.028 * size, far=True),
        tube("torso", spine, (belly, 0.9 * belly, 1.05 * belly)), tube("neck", throat, (0.085 * build, 0.06, 0.055)),
        *leg(True, False), *leg(False, False),
        tube("mouth", snout, (0.045 * size, 0.03 * size), keypoint="mouth", at=0.9),
        oval("head", back, face, 0.18 * size, 0.075 * size),
        oval("ear", crown, ear_angle, ear_length, 0.028 * size, keypoint="ear"),
        eye(walk(head, face, (0.02 * size, 0), (0.02 * size, -90))[2], 0.02 * size),
    ]


def bird(dice):
    tilt, build, length = -dice.between(5, 60), dice.between(0.8, 1.25), dice.between(0.34, 0.46)
    rump, breast = walk((0, 0), tilt, (length, 0))
    shoulder = walk(rump, tilt, (0.5 * length + 0.05, 0))[1]
    raised, folded = -dice.between(20, 110), dice.chance(0.4)

    def wing(far):
        start = (shoulder[0] + 0.05, shoulder[1] - 0.05) if far else shoulder
        if folded:
            turn, fold, reach = tilt + 180 + dice.between(-20, 10), dice.between(10, 25), 0.6
        else:
            turn, fold, reach = raised + dice.between(-25, 15) - 25 * far, -dice.between(10, 70), dice.between(0.8, 1.2)
        bones = [(0.14 * reach, 0, 0.05, 0.04), (0.14 * reach, fold, 0.04, 0.03)]
        shapes, wrist, angle = limb("wing", start, turn, bones, far=far)
        elbow, sweep, count = walk(start, turn, (0.14 * reach, 0))[1], angle - dice.between(30, 70), dice.whole(4, 6)
        inner = fan("wing", elbow, spread(sweep - 50, sweep, 3), [0.2] * 3, (0.03, 0.03, 0.016), far=far)
        outer = fan("wing", wrist, spread(sweep - 15, angle, count), spread(0.2, 0.3 * reach, count),
                    (0.022, 0.026, 0.01), far=far, keypoint="" if far else "hand", at=0.85)
        return inner + outer + shapes

    def leg(far):
        hip = walk(rump, tilt, (0.4 * length, 0), (0.05 if far else 0.08, 90))[2]
        bones = [(dice.between(0.09, 0.13), dice.between(-15, 45), 0.05 * build, 0.026),
                 (dice.between(0.1, 0.2), -dice.between(10, 80), 0.018, 0.014)]
        shapes, ankle, angle = limb("leg", hip, 90, bones, far=far, keypoints=("", "" if far else "knee"))
        toe = angle - dice.between(60, 90)
        return shapes + fan("foot", ankle, [toe + 180, toe - 28, toe + 28, toe], [0.06, 0.085, 0.085, 0.095],
                            (0.015, 0.014, 0.01), far=far, keypoint="" if far else "foot", at=0.4)

    throat = walk(breast, tilt - dice.between(0, 40), (dice.between(0.02, 0.12), 0),
                  (dice.between(0.02, 0.1), dice.between(-20, 40)))
    size, face = dice.between(0.85, 1.2), dice.between(-20, 30)
    back = walk(throat[-1], face, (-0.05 * size, 0))[1]
    beak = walk(walk(back, face, (0.12 * size, 0))[1], face, (dice.between(0.04, 0.1) * size, 0),
                (dice.between(0.04, 0.08) * size, dice.between(-5, 40)))
    count, half, droop = dice.whole(3, 5), dice.between(5, 35), tilt + 180 + dice.between(-20, 20)
    tail = fan("tail", walk(rump, tilt, (0.05, 0))[1], spread(droop - half, droop + half, count),
               [dice.between(0.2, 0.36)] * count, (0.03, 0.032, 0.022), keypoint="tail", at=0.85)
    return [
        *([] if folded else wing(True)), *leg(True), *tail, *leg(False),
        oval("torso", rump, tilt, length, dice.between(0.1, 0.14) * build),
        tube("neck", [walk(breast, tilt, (-0.06, 0))[1], *throat], (0.07, 0.055, 0.045, 0.042)),
        tube("mouth", beak, (0.032 * size, 0.022 * size, 0.006), keypoint="mouth"),
        oval("head", back, face, 0.15 * size, 0.064 * size),
        eye(walk(back, face, (0.09 * size, 0), (0.016 * size, -90))[2], 0.02 * size), *wing(False),
    ]


def fish(dice):
    bend, build, length = dice.between(-9, 9), dice.between(0.75, 1.4), dice.between(0.056, 0.088)
    spine = walk((0.3, 0), 180 - 4 * bend, *[(length, bend)] * 8)
    radii = [build * width for width in (0.04, 0.085, 0.112, 0.125, 0.127, 0.115, 0.09, 0.06, 0.035)]
    course = [180 + (i - 3.5) * bend for i in range(8)]  # of the spine at each of its bones

    def edge_fin(first, side, count, reach):
        # Rays along the back (side 1) or the belly (side -1), leaning towards the tail.
        rays = []
        for i in range(count):
            joint, angle = min(first + i, 7), course[min(first + i, 7)]
            base = walk(spine[joint], angle, (0.75 * radii[joint], 90 * side))[1]
            ray = walk(base, angle, (reach * (1 - 0.4 * i / count), side * dice.between(40, 65)))
            rays.append(tube("fin", ray, (0.032, 0.014)))
        return rays

    fork, lobe, count = dice.between(25, 55), dice.between(0.16, 0.28), dice.whole(4, 6)
    lengths = [lobe, *[lobe * dice.between(0.6, 0.9) for _ in range(count - 2)], lobe]
    tail = fan("tail", spine[-1], [course[-1] + bend + turn for turn in spread(fork, -fork, count)], lengths,
               (0.026, 0.03, 0.016), keypoint="tail", at=0.8)
    droop, reach, rays = dice.between(20, 80), dice.between(0.13, 0.22), dice.whole(3, 5)
    breast = fan("fin", walk(spine[3], course[3], (0.04, -90))[1],
                 [course[3] - droop + turn for turn in spread(-30, 25, rays)],
                 [reach * share for share in spread(0.7, 1, rays)], (0.02, 0.024, 0.012), keypoint="hand", at=0.8)
    jaw = walk(spine[0], course[0], (-0.06, 0))[1]
    return [
        *edge_fin(dice.whole(2, 3), 1, dice.whole(3, 5), dice.between(0.12, 0.22)),
        *edge_fin(5, -1, dice.whole(2, 3), dice.between(0.09, 0.18)),
        *tail, tube("torso", spine[2:], radii[2:]),
        oval("mouth", jaw, course[0], 0.1, 0.03 * build, keypoint="mouth", at=0.2),
        tube("head", spine[:4], radii[:4]), eye(walk(spine[1], course[1], (0.03 * build, 90))[1], 0.022), *breast,
    ]


SPECIES = {"biped": biped, "quadruped": quadruped, "bird": bird, "fish": fish}
