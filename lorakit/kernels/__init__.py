"""The fast paths, each with a plain twin that it is tested against."""


class Unsupported(Exception):
    """A model asks for something that a fast path does not do."""


def repeating(size: int, per_octave: int = 8) -> int:
    """`size` rounded up to one of `per_octave` sizes between two powers of two, at least by 16.

    oneDNN, which multiplies on CPUs, compiles every product for its exact shape, which takes milliseconds,
    and holds the code: rows of ever new lengths cost a fifth of the time, and a gigabyte.
    """
    grain = max(16, (1 << max(0, size.bit_length() - 1)) // per_octave)
    return -(-size // grain) * grain
