"""What makes a training start fast: nothing is imported that the recipe does not need, and imports are not
slowed down. No torch.

Nothing is done in a process that has torch already: it serves more than one training, as a notebook does.
Not here: tokenizer.without_torch, for verbs that need no tensors.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from lorakit.recipe import Recipe


def trainer(recipe: Recipe) -> Any:
    """The module lorakit.train, with all that a training by this recipe needs imported in one go."""
    without_bitsandbytes(recipe)
    with importing():
        from lorakit.adapters import METHODS

        import_module(METHODS[recipe.adapter.method].partition(":")[0])
        return import_module("lorakit.train")


def without_bitsandbytes(recipe: Recipe) -> None:
    """This process never imports bitsandbytes, unless the recipe quantizes the base or the optimizer's state.

    PEFT imports it wherever it finds it, and bitsandbytes imports torch's compiler: a second. None in
    sys.modules is Python's own way to say that there is no such module. The model's own code may want it.
    """
    quantizes = recipe.model.quantize != "none" or recipe.optimizer.name.endswith("_8bit")
    wanted = quantizes or recipe.model.trust_remote_code
    if not wanted and not {"torch", "transformers", "peft", "bitsandbytes"} & set(sys.modules):
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]


@contextmanager
def importing() -> Iterator[None]:
    """The block's imports without garbage collection; what they made is never looked at again by it.

    Modules make a million objects that stay. Python's collector is called for by their number and looks at
    all of them again and again: a quarter of the time in which torch, transformers and PEFT are imported.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
