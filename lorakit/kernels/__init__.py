"""The fast paths, each with a plain twin that it is tested against."""


class Unsupported(Exception):
    """A model asks for something that a fast path does not do."""
