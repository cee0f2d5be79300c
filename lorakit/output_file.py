"""A file that an option of the command line asks for: a page, a picture."""

import errno
import os
from pathlib import Path

from lorakit.errors import LorakitError
from lorakit.terminal import say


def check_place(option: str, file: Path) -> None:
    """Raises: LorakitError where no file can be written, before anything is read. `option`: as typed."""
    if file.is_dir() or (file.exists() and not file.is_file()):
        what = "is a directory" if file.is_dir() else "is no regular file"
        example = f"for example page.{option.removeprefix('--')}"
        raise LorakitError(f"{option} {file}: {what}", f"Give the name of a file, {example}.")
    if option == "--svg" and file.suffix.lower() != ".svg":
        raise LorakitError(f"--svg {file}: the picture is an SVG", "Give a name that ends in .svg.")
    if not file.parent.is_dir():
        raise LorakitError(f"{option} {file}: no such directory: {file.parent}", "Make it first.")


def write(option: str, file: Path, text: str) -> None:
    """`file` holds `text`, wholly or not at all. Raises: LorakitError where that may not be written."""
    place = file.resolve()  # of a link, what it leads to
    staged = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        staged.write_text(text, "utf-8")
        staged.replace(place)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        cure = "Give a file in a directory that you may write to."
        raise LorakitError(f"{option} {file}: cannot write: {error.strerror}", cure) from None
    finally:
        staged.unlink(missing_ok=True)
    say(f"{'page' if option == '--html' else 'picture':<9} {file}")
