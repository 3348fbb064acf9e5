"""Guards a user's policy: its errors become one line with the place in the user's file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import Tensor

from data_pipeline.strict_json import to_json
from models.roles import ParameterInfo
from pretrain.config.extension import Answer, Extension, ask
from pretrain.decay.policy import Policy, PolicySection, Setting
from pretrain.decay.sites import Site, label
from pretrain.errors import UsageError


class Guarded(Policy):
    """A user's policy; its exceptions and wrong results are reported as the user's errors."""

    def __init__(self, extension: Extension, config: PolicySection, setting: Setting) -> None:
        super().__init__(config, setting)
        self.kind, self._code = extension.kind, extension.code
        self._inner: Policy = self._ask("__init__", lambda: extension.cls(config, setting))
        self.wants, self.per_layer = extension.cls.wants, bool(extension.cls.per_layer)
        self.form, self.every = self._inner.form, self._inner.every
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise self._wrong(f"every is {self.every!r}; it must be a number of steps, 1 or more")
        self._step, self._has_observed = -1, False
        self._answers: dict[tuple[Site, float], float] = {}
        self._rehearse()

    def _rehearse(self) -> None:
        """Try λ of some updates, and saving and restoring the state, before training."""
        steps = self.setting.steps
        for step in sorted({0} if self.wants else {0, steps // 2, steps - 1}):
            for site, decay in self.setting.base.items():
                self.move(site, decay, step)
        saved = self._saved()
        self._ask("restore", lambda: self._inner.restore(saved))

    def move(self, site: Site, decay: float, step: int) -> float:
        if step != self._step:
            self._forget(step)
        first = self._answers.get((site, decay))
        answer = self._move(site, decay, step)
        if first is None and not self._answers:  # once in each update, at least
            first, answer = answer, self._move(site, decay, step)
        if first is not None and answer != first:
            raise self._wrong(
                f"{_moving(site, step)} returns {first:g} and, asked again, {answer:g}; λ may "
                "depend only on the keys, the setting, the step and what was observed, not on a "
                "clock, on random numbers or on how often it is asked"
            )
        self._answers[site, decay] = answer
        return answer

    def _forget(self, step: int) -> None:
        """Begin to compare answers; those from before another update or observation may differ."""
        self._step, self._answers = step, {}

    def _move(self, site: Site, decay: float, step: int) -> float:
        action = _moving(site, step)
        returned = self._ask(action, lambda: self._inner.move(site, decay, step))
        if isinstance(returned, bool) or not isinstance(returned, Real):
            raise self._wrong(f"{action} returns {_shown(returned)}, which is not a number")
        decay = float(returned)
        if not 0 <= decay < math.inf:
            raise self._wrong(f"{action} returns {decay:g}; λ must be a finite number, 0 or more")
        return decay

    def due(self, step: int) -> bool:
        return bool(self._ask("due", lambda: self._inner.due(step)))

    def observe(self, measured: Any, step: int) -> list[str]:
        self._forget(-1)
        lines = self._ask(f"observe at step {step}", lambda: self._inner.observe(measured, step))
        if not self._has_observed:  # before hours of training depend on a state that is lost
            self._saved()
            self._has_observed = True
        return [" ".join(str(line).split()) for line in lines or []]

    def measures(self, info: ParameterInfo) -> bool:
        return bool(self._ask("measures", lambda: self._inner.measures(info)))

    def figure(self, info: ParameterInfo, matrix: Tensor) -> float:
        return float(self._ask(f"figure of {info.name}", lambda: self._inner.figure(info, matrix)))

    def figures(self) -> dict[str, Any]:
        figures = dict(self._ask("figures", self._inner.figures))
        return {"policy": self.kind, **figures} if figures else {}

    def state(self) -> dict[str, Any]:
        return self._saved()

    def restore(self, state: dict[str, Any]) -> None:
        self._forget(-1)
        self._ask("restore", lambda: self._inner.restore(state))

    def _saved(self) -> dict[str, Any]:
        """The state in the form in which a checkpoint returns it.

        Raises:
            UsageError: if that is another state, with which a resumed run would go on wrongly.
        """
        state = self._ask("state", self._inner.state)
        try:
            saved: Any = json.loads(to_json(state))
        except (TypeError, ValueError) as error:
            raise self._wrong(f"state returns something that is not JSON ({error})") from None
        if not isinstance(saved, dict):
            raise self._wrong(f"state returns {_shown(state)}, which is not a mapping")
        if lost := _lost_in_json(state):
            raise self._wrong(f"state {lost}")
        return saved

    def _ask(self, action: str, call: Callable[[], Answer]) -> Answer:
        return ask(self._code, action, call, self._wrong)

    def _wrong(self, text: str) -> UsageError:
        return UsageError(f"{self.setting.key}: {self.kind}: {text}")


def _moving(site: Site, step: int) -> str:
    return f"move at {label(site)} in update {step}"


def _lost_in_json(value: Any, path: str = "") -> str:
    """The first part of a state that a checkpoint would return as something else, in words."""
    where = f" in {path}" * bool(path)
    if isinstance(value, tuple):
        return f"has the tuple {_shown(value)}{where}, which comes back as a list; use a list"
    if isinstance(value, list):
        parts = [(f"{path}[{index}]", part) for index, part in enumerate(value)]
    elif isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                return (
                    f"has the key {_shown(key)}{where}, which is not text and does not come back "
                    "as it is; use str(key) in state and turn it back in restore"
                )
        parts = [(f"{path}.{key}" if path else key, part) for key, part in value.items()]
    else:
        parts = []
    return next(filter(None, (_lost_in_json(part, name) for name, part in parts)), "")


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:80]
