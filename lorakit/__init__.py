"""lorakit: fine-tuning language models with low-rank adapters, driven by YAML recipes.

The Python API loads on use, so that `import lorakit` costs nothing: count_params, load_recipe, make_plan,
merge, train.
"""

import logging
from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "count_params", "load_recipe", "make_plan", "merge", "train"]

_API = {
    "count_params": "lorakit.count",
    "load_recipe": "lorakit.recipe",
    "make_plan": "lorakit.plan",
    "merge": "lorakit.merge",
    "train": "lorakit.train",
}


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks while it is imported
    # Kept: importing lorakit.train leaves the module under the name of the function.
    globals()[name] = found = getattr(import_module(_API[name]), name)
    return found


def __dir__() -> list[str]:
    return __all__
