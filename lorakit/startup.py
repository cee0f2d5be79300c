"""What makes a verb start fast: nothing is imported that a recipe does not need, and imports are not slowed
down. No torch.

Not here: tokenizer.without_torch, for verbs that need no tensors.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lorakit.recipe import Recipe


@contextmanager
def importing() -> Iterator[None]:
    """The block's imports without garbage collection; what they made is left alone by it from then on.

    Modules make a million objects that stay. Python's collector, which goes by their number, looks at them
    again and again: a quarter of the time in which torch, transformers and peft are imported. For a process
    of ours, not for one that lorakit is a guest of: gc.freeze() holds for all that exists.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def without_bitsandbytes(recipe: Recipe) -> None:
    """This process never imports bitsandbytes, unless the recipe quantizes.

    PEFT imports it wherever it finds it, and bitsandbytes imports torch's compiler: half a second. None in
    sys.modules is Python's own way to say that there is no such module. Nothing is done where it is imported
    already, or where the model's own code may want it.
    """
    if recipe.model.quantize == "none" and not recipe.model.trust_remote_code:
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


def import_for(recipe: Recipe) -> None:
    """Import what a training by this recipe needs, in one go; later imports of it cost nothing."""
    from importlib import import_module

    from lorakit.adapters import METHODS

    import_module(METHODS[recipe.adapter.method].partition(":")[0])
    import_module("lorakit.train")
