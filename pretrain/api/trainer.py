"""Ranks and decay of a run of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pretrain.api.groups import DecayGroups
from pretrain.api.probe import RankProbe

_FIGURES = ("loss", "learning_rate", "grad_norm")


class RankCallback(TrainerCallback):
    """Measures ranks during ``Trainer.train`` and keeps a run folder that reports read.

    ``Trainer(..., callbacks=[RankCallback("runs/mine", decay=groups)])``
    """

    def __init__(
        self, run: Path | str | None = None, *, decay: DecayGroups | None = None, **options: Any
    ) -> None:
        """
        Args:
            run: the folder; default: the Trainer's ``output_dir``.
            decay: the groups of its optimizer; default: the optimizer itself is watched.
            options: of `RankProbe`.
        """
        self._run, self._decay, self._options = run, decay, options
        self.probe: RankProbe | None = None
        """The probe of the run, from its beginning."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Measure before the first update."""
        model, optimizer = more["model"], more.get("optimizer")
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        about = {
            "seed": args.seed,
            "learning_rate": args.learning_rate,
            "global_batch": batch,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
            "loop": "transformers.Trainer",
        }
        self.probe = RankProbe(
            model,
            args.output_dir if self._run is None else self._run,
            decay=self._decay if self._decay is not None else optimizer,
            **{"steps": state.max_steps, "log_every": 1, **about, **self._options},
        )
        self.probe.begin(state.global_step or None)  # above 0 if it resumes

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Measure when it is due."""
        assert self.probe is not None
        tokens = state.num_input_tokens_seen or None
        self.probe.step(state.global_step, tokens=tokens)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Keep the figures that the Trainer logs."""
        assert self.probe is not None
        figures = {name: logs[name] for name in _FIGURES if logs and name in logs}
        if "loss" in figures:
            self.probe.log(state.global_step, **figures)
        if logs and "eval_loss" in logs:
            self.probe.evaluation(state.global_step, logs["eval_loss"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Complete the folder."""
        assert self.probe is not None
        self.probe.close()
