"""The figures of the synthetic data set: how a body of each species is put together.

A figure is a list of tubes in the order of painting, far limbs first. It faces right; its body is about 1 long. Points
are complex numbers, x + 1j * y, with y pointing down; angles are in degrees and 90 is down. Joint angles, lengths and
widths are random. Do not change the order of the random draws: the pictures of every seed would change.
"""

import cmath
import math
import random
from typing import NamedTuple

PART_NAMES = ("head", "eye", "ear", "mouth", "neck", "torso", "arm", "hand", "wing", "fin", "leg", "foot", "tail")


class Shape(NamedTuple):
    """A tube with round ends: cross-sections (c, n) along a spine, each from c - n to c + n."""
    part: int  # label in part_mask, 0 for clutter
    sections: list[tuple[complex, complex]]
    at: float | None = None  # where along the spine its keypoint lies, 0 to 1; None: it has no keypoint
    far: bool = False  # on the far side of the body: darker
    figure: int = -1  # -1 for clutter


class Dice(random.Random):
    """Random numbers that are the same in every Python: from random(), whose values for a seed Python promises to keep,
    uniform(), which is low + (high - low) * random(), and randbytes(), unchanged since 3.9."""
    __call__ = random.Random.uniform  # dice(low, high)

    def whole(self, low: int, high: int) -> int:
        """low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def pick(self, options):
        return options[self.whole(0, len(options) - 1)]


def squared(vector):
    """The square of the length of a vector."""
    return vector.real * vector.real + vector.imag * vector.imag


def step(start, angle, length):
    """The point that lies length away from start in the direction of angle."""
    return start + cmath.rect(length, math.radians(angle))


def walk(start, angle, *steps):
    """The joints of a chain, start included; a step is (length, bend before it)."""
    points = [start]
    for length, bend in steps:
        angle += bend
        points.append(step(points[-1], angle, length))
    return points


def tube(part, points, radii, at=None):
    """The shape along two or more points with half widths radii."""
    ahead, behind = [*points[1:], points[-1]], [points[0], *points[:-1]]
    normals = [(q - p) * 1j * (radius / math.sqrt(squared(q - p)))
               for p, q, radius in zip(behind, ahead, radii, strict=True)]
    return Shape(PART_NAMES.index(part) + 1 if part else 0, list(zip(points, normals, strict=True)), at)


def oval(part, start, angle, length, radius, at=None):
    """The ellipse that begins at start and goes on for length in the direction of angle."""
    # Twelve equal turns of the circle, stretched.
    steps, profile = (0.067, 0.183, 0.25, 0.25, 0.183, 0.067), (0.06, 0.5, 0.866, 1.0, 0.866, 0.5, 0.06)
    points = walk(start, angle, *[(length * share, 0) for share in steps])
    return tube(part, points, [radius * share for share in profile], at)


def limb(part, start, angle, *bones):
    """Two tubes, of bones (length, bend before it, radius where it starts, where it ends). The second of a leg has the
    keypoint, the knee. Returns the shapes, the tip, the last angle."""
    shapes = []
    for length, bend, *radii in bones:
        angle += bend
        tip = step(start, angle, length)
        shapes.append(tube(part, (start, tip), radii, 0.05 if part == "leg" and shapes else None))
        start = tip
    return shapes, tip, angle


def fan(part, start, angle, bends, lengths, radii, at=None):
    """Rays (feathers, toes, fingers) from one point. The last, painted over the others, has the keypoint."""
    rays = [tube(part, walk(start, angle + bend, (0.55 * length, 0), (0.45 * length, 0)), radii)
            for bend, length in zip(bends, lengths, strict=True)]
    return [*rays[:-1], rays[-1]._replace(at=at)]


def eye(path, radius):
    """A circle at the end of a walk."""
    return oval("eye", path[-1] - radius, 0, 2 * radius, radius, 0.5)


def spread(first, last, count):
    """Numbers from first to last at equal distances."""
    return [first + (last - first) * i / (count - 1) for i in range(count)]


def no_keypoints(shapes, far):
    return [shape._replace(at=None, far=far) for shape in shapes]


def biped(dice):
    """Like a person: upright, two arms with fingers, two legs, a round head with an ear and lips."""
    lean, build, turn = dice(-25, 30), dice(0.75, 1.35), dice(0, 0.07)
    spine = walk(0, -90 + lean, (0.15, 0), (0.17, dice(-15, 15)))
    chest = spine[-1]

    def arm(side):
        thick = 0.03 * build
        shoulder = chest + side * turn + 0.015j
        bones, wrist, angle = limb("arm", shoulder, 90 + lean, (0.17, dice(-150, 60), 1.2 * thick, thick),
                                   (0.15, -dice(0, 125), thick, 0.8 * thick))
        count = dice.whole(3, 4)
        fingers = fan("hand", wrist, angle, spread(-55, 35, count), [0.095] * count, (0.014, 0.013, 0.01))
        return [*bones, *fingers, oval("hand", wrist, angle, 0.07, 0.03, 0.5)]

    def leg(side):
        thick = 0.042 * build
        hip = 0.7 * side * turn + 0.01j
        bones, ankle, angle = limb("leg", hip, 90 + lean / 3, (0.23, dice(-65, 35), 1.2 * thick, thick),
                                   (0.22, dice(0, 85), thick, 0.6 * thick))
        heel, toes = step(ankle, angle + dice(75, 105), 0.03), step(ankle, angle - dice(75, 105), 0.1)
        return [*bones, tube("foot", (heel, ankle, toes), (0.026, 0.03, 0.02), 0.6)]

    tilt = -90 + lean + dice(-25, 25)
    chin, size, face = step(chest, tilt, 0.085), dice(0.85, 1.25), tilt + 90
    head = step(chin, tilt, 0.085 * size)
    jaw = walk(head, face, (0.055 * size, 0), (0.035 * size, 90))[-1]
    lips = step(jaw, face + dice(-15, 30), dice(0.03, 0.06) * size)
    return [
        *no_keypoints(arm(1), far=True), *no_keypoints(leg(1), far=True),
        tube("neck", (chest, chin), (0.034 * build, 0.034 * build)),
        tube("torso", spine, (0.075 * build, 0.066 * build, 0.09 * build)), *leg(-1),
        tube("mouth", (jaw, lips), (0.028 * size, 0.016 * size), 1), oval("head", chin, tilt, 0.19 * size, 0.08 * size),
        oval("ear", step(head, face, -0.025 * size), tilt + dice(-25, 10), dice(0.05, 0.09) * size, 0.024 * size, 0.5),
        eye(walk(head, face, (0.045 * size, 0), (0.015 * size, -90)), 0.021 * size), *arm(-1),
    ]


def quadruped(dice):
    """Like a dog: level body, four legs (only the near fore leg has keypoints), neck, snout, two ears, tail."""
    length, build, tall = dice(0.42, 0.62), dice(0.75, 1.3), dice(0.13, 0.24)
    rump, middle, chest = walk(0, dice(-10, 10), (length / 2, 0), (length / 2, dice(-20, 20)))

    def leg(joint, way, thick, side):
        swing, bend = way * dice(-40, 25), way * dice(5, 60)
        hip = joint + 0.03 * way + 0.03 * side + 0.04j
        bones, ankle, angle = limb("leg", hip, 90, (tall, swing, 1.3 * thick, 0.8 * thick),
                                   (tall, bend, 0.8 * thick, 0.55 * thick))
        foot = walk(ankle, angle - dice(50, 80), (-0.02, 0), (0.075, 0))[1:]
        return [*bones, tube("foot", foot, (0.03, 0.024), 0.5)]

    hind, fore = (rump, 1, 0.045 * build), (chest, -1, 0.036 * build)
    throat = walk(chest - 0.03j, -dice(15, 80), (dice(0.06, 0.2), 0), (dice(0.06, 0.2), dice(-10, 25)))
    size, face = dice(0.85, 1.3), dice(-10, 50)
    back = step(throat[-1], face, -0.05 * size)
    head = step(back, face, 0.09 * size)
    snout = walk(head, face, (0.03 * size, 0), (0.02 * size, 90), (dice(0.07, 0.16) * size, -90))[2:]
    crown = walk(back, face, (0.035 * size, 0), (0.05 * size, -90))[-1]
    ear_angle, ear_length = face - dice(70, 220), dice(0.07, 0.17) * size
    curl, bones = dice(-28, 28), dice.whole(4, 6)
    tail = walk(rump - 0.03 - 0.05j, dice(110, 250), *[(dice(0.25, 0.5) / bones, curl)] * bones)
    tail_radii = [0.028 * build * share for share in spread(1, dice.pick((0.5, 1.0, 2.0)), bones + 1)]
    belly = dice(0.1, 0.14) * build
    return [
        *no_keypoints(leg(*hind, 1), far=True), *no_keypoints(leg(*fore, 1), far=True),
        tube("tail", tail, tail_radii, 0.9),
        *no_keypoints([oval("ear", crown, ear_angle + 25, ear_length, 0.028 * size)], far=True),
        tube("torso", (rump, middle, chest), (belly, 0.9 * belly, 1.05 * belly)),
        tube("neck", throat, (0.085 * build, 0.06, 0.055)), *no_keypoints(leg(*hind, -1), far=False), *leg(*fore, -1),
        tube("mouth", snout, (0.045 * size, 0.03 * size), 0.9), oval("head", back, face, 0.18 * size, 0.075 * size),
        oval("ear", crown, ear_angle, ear_length, 0.028 * size, 0.5),
        eye(walk(head, face, (0.02 * size, 0), (0.02 * size, -90)), 0.02 * size),
    ]


def bird(dice):
    """Raised or folded wings of feathers, two legs with toes, a beak, a fan of tail feathers."""
    tilt, build, length = -dice(5, 60), dice(0.8, 1.25), dice(0.34, 0.46)
    rump, breast, shoulder = 0, step(0, tilt, length), step(0, tilt, 0.5 * length + 0.05)
    raised, folded = -dice(20, 110), dice.random() < 0.4

    def wing(far):
        start = shoulder + far * (0.05 - 0.05j)
        if folded:
            turn, fold, reach = tilt + 180 + dice(-20, 10), dice(10, 25), 0.6
        else:
            turn, fold, reach = raised + dice(-25, 15) - 25 * far, -dice(10, 70), dice(0.8, 1.2)
        bones, wrist, angle = limb("wing", start, turn, (0.14 * reach, 0, 0.05, 0.04), (0.14 * reach, fold, 0.04, 0.03))
        elbow, sweep, count = step(start, turn, 0.14 * reach), angle - dice(30, 70), dice.whole(4, 6)
        return [*fan("wing", elbow, 0, spread(sweep - 50, sweep, 3), [0.2] * 3, (0.03, 0.03, 0.016)),
                *fan("wing", wrist, 0, spread(sweep - 15, angle, count), spread(0.2, 0.3 * reach, count),
                     (0.022, 0.026, 0.01), 0.85), *bones]

    def leg(far):
        hip = walk(rump, tilt, (0.4 * length, 0), (0.05 if far else 0.08, 90))[-1]
        bones, ankle, angle = limb("leg", hip, 90, (dice(0.09, 0.13), dice(-15, 45), 0.05 * build, 0.026),
                                   (dice(0.1, 0.2), -dice(10, 80), 0.018, 0.014))
        return [*bones, *fan("foot", ankle, angle - dice(60, 90), (180, -28, 28, 0), (0.06, 0.085, 0.085, 0.095),
                             (0.015, 0.014, 0.01), 0.4)]

    throat = walk(breast, tilt - dice(0, 40), (dice(0.02, 0.12), 0), (dice(0.02, 0.1), dice(-20, 40)))
    size, face = dice(0.85, 1.2), dice(-20, 30)
    back = step(throat[-1], face, -0.05 * size)
    beak = walk(step(back, face, 0.12 * size), face,
                (dice(0.04, 0.1) * size, 0), (dice(0.04, 0.08) * size, dice(-5, 40)))
    count, half, droop = dice.whole(3, 5), dice(5, 35), tilt + 180 + dice(-20, 20)
    tail = fan("tail", step(rump, tilt, 0.05), 0, spread(droop - half, droop + half, count), [dice(0.2, 0.36)] * count,
               (0.03, 0.032, 0.022), 0.85)
    return [
        *([] if folded else no_keypoints(wing(True), far=True)), *no_keypoints(leg(True), far=True), *tail, *leg(False),
        oval("torso", rump, tilt, length, dice(0.1, 0.14) * build),
        tube("neck", (step(breast, tilt, -0.06), *throat), (0.07, 0.055, 0.045, 0.042)),
        tube("mouth", beak, (0.032 * size, 0.022 * size, 0.006), 0.5),
        oval("head", back, face, 0.15 * size, 0.064 * size),
        eye(walk(back, face, (0.09 * size, 0), (0.016 * size, -90)), 0.02 * size), *wing(False),
    ]


def fish(dice):
    """A bent body that narrows to the tail, fins of rays on the back, the belly and the breast, a forked tail."""
    bend, build, length = dice(-9, 9), dice(0.75, 1.4), dice(0.056, 0.088)
    spine = walk(0.3, 180 - 4 * bend, *[(length, bend)] * 8)
    radii = [build * width for width in (0.04, 0.085, 0.112, 0.125, 0.127, 0.115, 0.09, 0.06, 0.035)]
    course = [180 + (i - 3.5) * bend for i in range(8)]  # of the spine at each of its bones

    def edge_fin(first, side, count, reach):
        """Rays from joints of the spine, on the back (side 1) or the belly (side -1), leaning towards the tail."""
        rays = []
        for i, joint in enumerate(range(first, first + count)):
            base = step(spine[joint], course[joint] + 90 * side, 0.75 * radii[joint])
            tip = step(base, course[joint] + side * dice(40, 65), reach * (1 - 0.4 * i / count))
            rays.append(tube("fin", (base, tip), (0.032, 0.014)))
        return rays

    fork, lobe, count = dice(25, 55), dice(0.16, 0.28), dice.whole(4, 6)
    lengths = [lobe, *[lobe * dice(0.6, 0.9) for _ in range(count - 2)], lobe]
    tail = fan("tail", spine[-1], course[-1] + bend, spread(fork, -fork, count), lengths, (0.026, 0.03, 0.016), 0.8)
    droop, reach, rays = dice(20, 80), dice(0.13, 0.22), dice.whole(3, 5)
    breast = fan("fin", step(spine[3], course[3] - 90, 0.04), course[3] - droop, spread(-30, 25, rays),
                 [reach * share for share in spread(0.7, 1, rays)], (0.02, 0.024, 0.012), 0.8)
    return [
        *edge_fin(dice.whole(2, 3), 1, dice.whole(3, 5), dice(0.12, 0.22)),
        *edge_fin(5, -1, dice.whole(2, 3), dice(0.09, 0.18)), *tail, tube("torso", spine[2:], radii[2:]),
        oval("mouth", step(spine[0], course[0], -0.06), course[0], 0.1, 0.03 * build, 0.2),
        tube("head", spine[:4], radii[:4]), eye(walk(spine[1], course[1], (0.03 * build, 90)), 0.022), *breast,
    ]


SPECIES = {"biped": biped, "quadruped": quadruped, "bird": bird, "fish": fish}
