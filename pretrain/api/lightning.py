"""Ranks and decay of a run of Lightning's Trainer."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pretrain.api.groups import DecayGroups
from pretrain.api.probe import RankProbe
from pretrain.errors import UsageError


def _base() -> Any:
    """Lightning's class of callbacks, under either of its names."""
    if find_spec("lightning") is not None:
        from lightning.pytorch import Callback

        return Callback
    if find_spec("pytorch_lightning") is not None:
        from pytorch_lightning import Callback

        return Callback
    raise UsageError("Lightning is not installed; `pip install lightning`")


class LightningRankCallback(_base()):  # type: ignore[misc]
    """Measures ranks during ``Trainer.fit`` and keeps a run folder that reports read.

    ``Trainer(callbacks=[LightningRankCallback("runs/mine")])``
    """

    def __init__(
        self,
        run: Path | str,
        *,
        decay: DecayGroups | None = None,
        module: str = "model",
        **options: Any,
    ) -> None:
        """
        Args:
            run: the folder.
            decay: the groups of its optimizer; default: the first optimizer is watched.
            module: attribute of the LightningModule that is the model; empty: itself.
            options: of `RankProbe`.
        """
        super().__init__()
        self._run, self._decay, self._module, self._options = run, decay, module, options
        self.probe: RankProbe | None = None
        """The probe of the run, from its beginning."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure before the first update."""
        model = getattr(pl_module, self._module) if self._module else pl_module
        steps = int(trainer.estimated_stepping_batches)
        self.probe = RankProbe(
            model,
            self._run,
            decay=self._decay if self._decay is not None else trainer.optimizers[0],
            **{"steps": steps, "loop": "lightning.Trainer", **self._options},
        )
        self.probe.begin(trainer.global_step or None)  # above 0 if it resumes

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log and measure when it is due; with accumulated gradients, once for an update."""
        assert self.probe is not None
        if trainer.global_step <= self.probe.last:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        figures = {"learning_rate": rate} if loss is None else {"loss": loss, "learning_rate": rate}
        self.probe.step(trainer.global_step, **figures)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Record the loss that the module logs as ``val_loss``."""
        if self.probe is not None and "val_loss" in trainer.callback_metrics:
            self.probe.evaluation(trainer.global_step, float(trainer.callback_metrics["val_loss"]))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Complete the folder."""
        assert self.probe is not None
        self.probe.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Complete the folder up to here."""
        if self.probe is not None:
            self.probe.close()
