"""The run folder of somebody else's loop, in the form that reports read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data_pipeline.strict_json import to_json
from models.config import GPTConfig
from models.factors import AttentionShape
from pretrain.cli.console import warn
from pretrain.config.decay import WeightDecayConfig
from pretrain.config.recipe import parse_config
from pretrain.config.run import RanksConfig
from pretrain.errors import UsageError
from pretrain.ranks.probe import Row, summary
from pretrain.ranks.table import measured_steps, merge_ranks
from pretrain.ranks.writer import RankWriter
from pretrain.runs.environment import environment
from pretrain.runs.folder import CONFIG, ENVIRONMENT, read_starts, write_text
from pretrain.runs.lock import RunLock
from pretrain.runs.loop import LOOP
from pretrain.runs.metrics import Tracker
from pretrain.runs.records import FIGURES

_DIALECTS = {"gpt2": "gpt2", "gpt_neox": "gpt_neox", "llama": "llama", "mistral": "llama"}
_LEARNED = ("gpt2", "gpt_neo", "opt", "bert", "vit", "deit")
"""Model types with learned positions; another one without rotation may have any, or none."""
_OF_OTHER_FORMS = {"adadecay_slope", "nuclear_every"}
"""Keys about forms of decay that a loop cannot have."""


def loop_recipe(
    shape: AttentionShape,
    values: Mapping[str, Any],
    decay: WeightDecayConfig | None,
    ranks: RanksConfig,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """What is known of a run, as sections of a recipe: reports sort runs by its keys.

    A key that is not known is absent, because its default need not be true of the loop.

    Args:
        values: the content of the model's config.json.
        decay: the decay by role; None if it is not known.
        about: seed, steps, global_batch, context, learning_rate, as far as they are known.
    """
    optimizer: dict[str, Any] = {}
    if about.get("learning_rate"):
        optimizer["learning_rate"] = about["learning_rate"]
    if decay:
        optimizer["weight_decay"] = decay.model_dump(mode="json", exclude=_OF_OTHER_FORMS)
    sections = {
        "model": _model(shape, values, about.get("context") or 0),
        "train": {key: about[key] for key in ("steps", "global_batch") if about.get(key)},
        "optimizer": optimizer,
        "evaluation": {"at_end": "none"},
        "ranks": ranks.model_dump(mode="json"),
    }
    known = {name: section for name, section in sections.items() if section}
    if about.get("seed") is not None:
        known = {"seed": about["seed"], **known}
    if about.get("precision") in ("fp32", "bf16"):
        known["precision"] = about["precision"]
    return known


def _model(shape: AttentionShape, values: Mapping[str, Any], context: int) -> dict[str, Any]:
    """The shape of a model in our keys, as far as it has them."""
    known: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_size,
        "qk_norm": shape.qk_norm,
    }
    dialect = _DIALECTS.get(str(values.get("model_type")))
    known = ({"dialect": dialect} if dialect else {}) | known
    if shape.rotary_dim:
        known |= {"position": "rotary", "rotary_fraction": shape.rotary_dim / shape.head_size}
    elif values.get("model_type") in _LEARNED:
        known["position"] = "learned"
    more = {
        "vocabulary_size": values.get("vocab_size"),
        "context": context or None,  # a model's most positions need not be those in training
        "ffn_hidden_size": values.get("intermediate_size") or values.get("n_inner"),
        "tied_head": values.get("tie_word_embeddings"),
    }
    known_more = known | {key: value for key, value in more.items() if value is not None}
    try:
        GPTConfig.model_validate(known_more)
    except ValidationError:  # a value that our models cannot have
        return known
    return known_more


class LoopFolder:
    """Writes the run folder of somebody else's loop; used by its main process alone."""

    def __init__(self, run: Path, known: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """
        Args:
            known: sections of a recipe, without what is not known (`loop_recipe`).
            about: what else is known about the loop, for the folder's record of it.

        Raises:
            UsageError: if the folder holds a run of this program's own training.
            RunError: if its rank table is damaged.
            BusyError: if another process writes there.
        """
        if (run / CONFIG).exists() and not (run / LOOP).exists():
            raise UsageError(f"{run}: holds a run of `pretrain train`; choose another folder")
        self._config = parse_config({**known}, "RankProbe")
        self._run, self._known = run, _only(known, self._config.model_dump(mode="json"))
        self._about = dict(about)
        self._tracker = Tracker(run, self._config, active=True)
        self._table = RankWriter(run, self._config.ranks)
        self._refused = False
        self._lock, self._is_open = RunLock(run), False
        earlier = _last_measured(run)
        self._open()
        if earlier:  # of another loop, unless `begin` says that this one continues it
            self._release()
        else:
            self._write_start()

    def _open(self) -> None:
        """Keep other processes out of the folder."""
        self._lock.acquire()
        self._is_open = True

    def _release(self) -> None:
        self._is_open = False
        self._lock.release()

    def _write_start(self) -> None:
        """Write what is known of the loop, and the environment of this start."""
        write_text(self._run / LOOP, to_json(self._about, indent=1))
        self._write_known()
        precision = self._about.get("precision")
        setting = {"precision": precision} if precision else {}
        starts = [*read_starts(self._run), {**environment(), **setting}]
        write_text(self._run / ENVIRONMENT, to_json(starts, indent=1))

    def _write_known(self) -> None:
        write_text(self._run / CONFIG, yaml.safe_dump(self._known, sort_keys=False))

    def begin(self, step: int | None) -> None:
        """Begin a run, or continue the folder's after ``step``; what was written later is removed.

        Raises:
            UsageError: if a run would begin in a folder that has measurements of another.
        """
        if step is None:
            self._refuse_earlier()
        if not self._is_open:
            self._open()
            self._write_start()
        self._tracker.rewind(step or 0)
        self._table.rewind(step or 0)

    def _refuse_earlier(self) -> None:
        """Refuse to mix a new run with the measurements in the folder, or to remove them."""
        if last := _last_measured(self._run):
            self._release()
            raise UsageError(
                f"{self._run}: holds a run that was measured up to step {last}; choose another "
                "folder, or continue that run: probe.begin(STEP) instead of `with`, or a Trainer "
                "that resumes from a checkpoint"
            )

    def _refuse_unless_open(self) -> None:
        if not self._is_open:
            self._refuse_earlier()

    def log(self, step: int, figures: Mapping[str, float | None], decays: dict[str, float]) -> None:
        """One line about an update; a figure that is not known is null.

        Args:
            figures: loss, learning_rate, grad_norm and tokens_per_second.
            decays: λ in use by group.
        """
        self._refuse_unless_open()
        known = {name: _number(figures.get(name)) for name in FIGURES}
        self._tracker.log("train", step, {**known, "weight_decay": decays})

    def evaluation(self, step: int, loss: float) -> None:
        """One line about a held-out loss, in nats per token."""
        self._refuse_unless_open()
        self._tracker.log(
            "evaluation", step, {"split": self._config.evaluation.split, "loss": loss}
        )

    def ranks(self, step: int, rows: list[Row], seconds: float) -> None:
        """One measurement."""
        self._refuse_unless_open()
        reason = self._table.add(step, rows)
        if reason and not self._refused:
            warn(f"{reason}; measurements wait in memory")
        self._refused = bool(reason)
        self._tracker.log("ranks", step, {**summary(rows), "seconds": seconds})

    def close(self, last: int) -> None:
        """Merge the table and release the folder; a disk that refuses this ends no loop.

        Args:
            last: the number of updates that were made.
        """
        if not self._is_open:  # nothing was written
            return
        train = self._known.get("train", {})
        try:
            if reason := self._table.write_waiting():
                warn(f"{reason}; the last measurements are lost: {self._table.waiting}")
            if last != train.get("steps") and last > 0:
                self._known["train"] = {**train, "steps": last}
                self._write_known()
            merge_ranks(self._run)
        except OSError as error:
            warn(f"{error.filename or self._run}: {error.strerror}; the folder is not complete")
        finally:
            self._tracker.close()
            self._release()


def _last_measured(run: Path) -> int:
    """The last step that the folder's rank table has; 0 if it has none."""
    return max(measured_steps(run), default=0)


def _only(known: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a checked recipe, for the keys that are known."""
    return {
        key: _only(value, tree[key]) if isinstance(value, dict) and value else tree[key]
        for key, value in known.items()
    }


def _number(value: Any) -> float | None:
    value = value.detach() if hasattr(value, "detach") else value
    number = float(value) if value is not None else math.nan
    return None if math.isnan(number) else number
