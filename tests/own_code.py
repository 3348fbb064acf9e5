"""The example of docs/extending.md as files, and small policies that are wrong."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from tests.tools import ROOT, base_recipe

PAGE = ROOT / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
EXAMPLE, REMEMBERS, TRACKER, TASK = BLOCKS
FILE = "layer_cosine.py"
COSINE = {"kind": f"{FILE}:LayerCosine", "roles": ["attention"], "deepest": 3}
STABLE = {"kind": "sub/stable.py:StableRank", "roles": ["mlp"], "every": 2}
KEY = "optimizer.weight_decay.policies[0]"
WRONG = """
import os
from pretrain.decay.policy import Policy, PolicySection


class Wrong(Policy):
    class Config(PolicySection):
        share: float = 1.0

    def move(self, site, decay, step):
        {body}
"""


def write_example(folder: Path) -> None:
    """The files of the page, beside a recipe."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(EXAMPLE)
    (folder / "sub" / "stable.py").write_text(REMEMBERS)
    (folder / "table.py").write_text(TRACKER)
    (folder / "parity.py").write_text(TASK)


def recipe_with(data: Path, *policies: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The small recipe with policies."""
    values = base_recipe(data)
    values["optimizer"]["weight_decay"]["policies"] = [dict(one) for one in policies]
    return {**values, **more}


def layer_cosine(layer: int, layers: int, step: int, steps: int) -> float:
    """What the example multiplies λ by, as its page says it: by layer, times a cosine."""
    return (1 + 2 * layer / (layers - 1)) * (0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2)
