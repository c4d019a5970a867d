"""Files as nobody wrote them."""

import random

INSERTED = (b"9" * 40, b"[" * 3000, b"\0", b"NaN", b"-", b'"', b"}", b"\xff" * 8)


def set_entry(*keys, to):
    """A change of (arrays, about) of a saved estimator: ``about[key][key] ... = to``."""

    def change(arrays, about):
        for key in keys[:-1]:
            about = about[key]
        about[keys[-1]] = to

    return change


def mutations(data, count, seed=0):
    """``data`` so many times, each with bytes changed, cut off, put in or repeated."""
    dice = random.Random(seed)
    for _ in range(count):
        yield _mutated(data, dice)


def _mutated(data, dice):
    while True:
        found = bytearray(data)
        for _ in range(dice.choice((1, 1, 2, 8))):
            at = dice.randrange(len(found) + 1)
            kind = dice.randrange(4)
            if kind == 0 and at < len(found):
                found[at] = dice.randrange(256)
            elif kind == 1:
                del found[at:]
            elif kind == 2:
                found[at:at] = dice.choice(INSERTED)
            else:
                end = dice.randrange(at, len(found) + 1)
                found[at:at] = found[at:end]
        if found != data:
            return bytes(found)
