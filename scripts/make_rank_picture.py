"""Make docs/adalora-ranks.svg and the numbers that it shows, docs/adalora-ranks.json, from a run of AdaLoRA.

    lorakit train recipes/quickstart/recipe.yaml \\
        --set 'adapter={method: adalora, init_rank: 6, target_rank: 4}' --output runs/ada
    python scripts/make_rank_picture.py runs/ada

Another processor rounds otherwise, so the ranks of another machine may differ by a few. Without a run the
picture is drawn anew from the numbers that are there.
"""

import argparse
import json
from pathlib import Path

from lorakit.picture import rank_heat_map

DOCS = Path(__file__).parent.parent / "docs"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", help="its directory")
    run = parser.parse_args().run
    numbers = DOCS / "adalora-ranks.json"
    if run:
        numbers.write_bytes((run / "params.json").read_bytes())
    (DOCS / "adalora-ranks.svg").write_text(rank_heat_map(json.loads(numbers.read_text())), "utf-8")
