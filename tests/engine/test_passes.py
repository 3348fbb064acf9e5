"""Passes begun before their update, decided on the device or replayed change no number."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.gpt import whole_model
from pretrain.config.recipe import Config, parse_config
from pretrain.config.run import RanksConfig
from pretrain.decay.plan import plan_decay
from pretrain.distributed.grid import Grid
from pretrain.engine import recorded
from pretrain.engine.engine import Engine, build_engine
from pretrain.engine.passes import Batch
from pretrain.engine.queues import Beside
from pretrain.engine.recorded import RecordedPasses
from pretrain.ranks.later import LateRanks
from pretrain.ranks.probe import measure


class Alone(Grid):
    """One process, without torch.distributed."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


GRID = Alone(1, 1, 1, 0, torch.device("cpu"), None, None, None)
UPDATES = 7


def config_of(precision: str = "fp32", micro: int = 2, **optimizer: Any) -> Config:
    model = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "context": 16,
             "vocabulary_size": 96}  # fmt: skip
    return parse_config(
        {
            "model": model,
            "train": {"steps": 100, "global_batch": 4, "micro_batch": micro},
            "precision": precision,
            "optimizer": {"gradient_clipping": 0.5, "weight_decay": {"default": 0.1}} | optimizer,
        }
    )


def engine_of(config: Config) -> Engine:
    infos = whole_model(config.model)
    return build_engine(config, GRID, plan_decay(infos, config.optimizer.weight_decay))


def updater(engine: Engine) -> Any:
    return vars(engine)["_updater"]


def batches(config: Config) -> Iterator[Batch]:
    draw = torch.Generator().manual_seed(3)
    micro = int(config.train.micro_batch)
    while True:
        tokens = torch.randint(96, (micro, config.model.context + 1), generator=draw)
        yield tokens[:, :-1], tokens[:, 1:]


def trained(
    engine: Engine, source: Iterator[Batch], lost: tuple[int, ...] = (), more: bool = True
) -> dict[str, Any]:
    """Losses, norms, masters, moments and the record of decay after some updates."""
    found: dict[str, Any] = {"losses": [], "norms": [], "ranks": []}
    measured = engine.loss
    for step in range(UPDATES):
        if step in lost:
            engine.loss = lambda *given: measured(*given) * float("nan")  # type: ignore[method-assign]
            engine.forget_next_update()
        engine.begin_step(step, 1e-2)
        found["losses"].append(engine.train_step(source, more=more and step + 1 not in lost))
        found["norms"].append(engine.gradient_norm)
        engine.loss = measured  # type: ignore[method-assign]
        assert engine.skipped == (step in lost)
        if step % 3 == 0:
            rows = measure(engine, step, 0, RanksConfig())
            found["ranks"] += [row["nuclear_norm"] for row in rows]
    found["decay"] = engine.control.state()
    for fragment in engine.fragments():
        found[fragment.info.name] = fragment.master.clone()
        for key, value in fragment.moments().items():
            found[f"{fragment.info.name}.{key}"] = value.clone()
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if torch.is_tensor(value):
            assert torch.equal(value, other[key]), key
        elif isinstance(value, list):
            np.testing.assert_array_equal(value, other[key], err_msg=key)
        else:
            assert value == other[key], key


@pytest.mark.parametrize("micro", [4, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_begun_early_is_the_same(precision: str, micro: int) -> None:
    config = config_of(precision, micro)
    plain, early = engine_of(config), engine_of(config)
    early.looks_ahead = True
    wanted = trained(plain, batches(config))
    assert not plain._passes.has_begun_next
    assert_same(wanted, trained(early, batches(config)))
    assert early._passes.has_begun_next


@pytest.mark.parametrize(
    "optimizer",
    [
        {},
        {"name": "sgd"},
        {"weight_decay": {"default": 0.1, "form": "cautious"}},
        {"weight_decay": {"default": 1e-3, "coupling": "none"}},
        {"weight_decay": {"default": 0.1, "policies": [{"kind": "awd"}]}},
    ],
    ids=["plain", "sgd", "cautious", "coupling", "awd"],
)
def test_the_device_decides_where_nothing_else_looks(optimizer: dict[str, Any]) -> None:
    """A lost update changes nothing, is not recorded, and does not count for the moments."""
    config = config_of(**optimizer)
    waits, decides = engine_of(config), engine_of(config)
    assert updater(decides).decides_on_device == (not optimizer)
    updater(waits).decides_on_device = waits.shrinker._records_later = False
    found = trained(decides, batches(config), lost=(0, 3))
    assert_same(trained(waits, batches(config), lost=(0, 3)), found)
    if not optimizer:
        steps = [float(s["step"]) for s in updater(decides).optimizer.state.values()]
        assert set(steps) == {UPDATES - 2.0}


def test_what_was_begun_from_another_source_is_dropped() -> None:
    """As after a return to a checkpoint: the new source's first batch is not lost."""
    config = config_of()
    plain, early = engine_of(config), engine_of(config)
    early.looks_ahead = True
    for engine in (plain, early):
        engine.begin_step(0, 1e-2)
        engine.train_step(batches(config), more=True)
    assert early._passes.has_begun_next
    assert_same(trained(plain, batches(config)), trained(early, batches(config)))


def test_an_error_of_the_next_batch_comes_with_the_next_update() -> None:
    config = config_of(micro=4)
    engine = engine_of(config)
    engine.looks_ahead = True

    def failing() -> Iterator[Batch]:
        yield next(batches(config))
        raise OSError("the disk is gone")

    source = failing()
    engine.begin_step(0, 1e-2)
    assert np.isfinite(engine.train_step(source, more=True))
    with pytest.raises(OSError, match="the disk is gone"):
        engine.train_step(source, more=True)

    engine._passes._alone = False  # others would wait for this process: it ends at once
    source = failing()
    with pytest.raises(OSError, match="the disk is gone"):
        engine.train_step(source, more=True)

    engine = engine_of(config)
    engine.looks_ahead = True
    source = iter([next(batches(config))])  # the data ends
    assert np.isfinite(engine.train_step(source, more=True))
    with pytest.raises(StopIteration):
        engine.train_step(source, more=True)


class Graph:
    """A stand-in for a CUDA graph: a replay runs what was recorded, on the places of then."""

    made: list[Graph]

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.work()

    def pool(self) -> str:
        return "pool"

    work: Any = None


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Graphs that were made."""
    made: list[Graph] = []

    def graph() -> Graph:
        made.append(Graph())
        return made[-1]

    @contextmanager
    def capture(graph: Graph, pool: Any, capture_error_mode: str) -> Iterator[None]:
        assert pool == (None if len(made) == 1 else "pool")
        assert capture_error_mode == "thread_local"
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(recorded, "_used_share", lambda _: 0.1)
    return made


@pytest.mark.parametrize("micro", [4, 1])
def test_replayed_passes_count_like_others(micro: int, graphs: list[Graph]) -> None:
    config = config_of(micro=micro)
    engine = engine_of(config)
    passes = engine._passes
    run = passes._forward_backward
    passes._run = player = RecordedPasses(updater(engine), run)
    plain = trained(engine_of(config), batches(config))

    def record(first: bool, inputs: Any, labels: Any) -> Any:
        gradients = [buffer.gradient for buffer in updater(engine).buffers]
        before = [gradient.clone() for gradient in gradients]
        made = RecordedPasses._recorded(player, first, inputs, labels)
        assert made is not None
        torch._foreach_copy_(gradients, before)  # a real graph computes nothing while it is made

        def work() -> None:
            done = updater(engine).micro_batches_done
            made.loss.copy_(run(made.inputs, made.labels))
            updater(engine).micro_batches_done = done

        made.graph.work = work
        return made

    player._recorded = record  # type: ignore[method-assign]
    found = trained(engine, batches(config))
    kinds = 1 if micro == 4 else 2
    assert len(graphs) == kinds and all(graph.replays for graph in graphs)
    assert sum(graph.replays for graph in graphs) == UPDATES * 4 // micro - 3 * kinds
    assert_same(plain, found)


@pytest.mark.parametrize("why", ["error", "memory"])
def test_passes_that_cannot_be_recorded_run_one_by_one(
    why: str, graphs: list[Graph], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if why == "memory":
        monkeypatch.setattr(recorded, "_used_share", lambda _: 0.6)
    else:

        @contextmanager
        def refused(*_: Any, **__: Any) -> Iterator[None]:
            yield
            raise torch.AcceleratorError("operation not permitted when stream is capturing\nmore")

        monkeypatch.setattr(torch.cuda, "graph", refused)
    config = config_of()
    engine = engine_of(config)
    passes = engine._passes
    passes._run = RecordedPasses(updater(engine), passes._forward_backward)
    assert_same(trained(engine_of(config), batches(config)), trained(engine, batches(config)))
    said = capsys.readouterr().err
    assert said.count("speed.graph: passes are not recorded") == 1
    assert ("more than half" if why == "memory" else "not permitted when stream") in said
    assert "more\n" not in said.replace("more than", "")


def test_statistics_use_a_second_queue_only_beside_a_begun_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []

    class Stream:
        def wait_event(self, event: Any) -> None:
            events.append(f"waits for {event.number}")

        def synchronize(self) -> None:
            events.append("done")

    @contextmanager
    def stream(_: Any) -> Iterator[None]:
        events.append("begins")
        yield

    numbers = iter(range(9))
    made = lambda: SimpleNamespace(number=next(numbers), record=lambda: events.append("made"))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: Stream())
    monkeypatch.setattr(torch.cuda, "Event", made)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    config = config_of()
    engine = engine_of(config)
    engine.beside = Beside(torch.device("cuda"))
    engine.looks_ahead = True
    source = batches(config)
    for more in (True, False):
        engine.begin_step(0, 1e-2)
        engine.train_step(source, more=more)
        measure(engine, 1, 0, RanksConfig())
    assert events == ["made", "waits for 0", "begins", "done", "made"]

    # One that is finished later: the main queue waits for the second one, and the host for nothing.
    events.clear()
    main = SimpleNamespace(wait_stream=lambda _: events.append("main queue waits"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    engine.begin_step(1, 1e-2)
    engine.train_step(source, more=True)
    late = LateRanks(engine)
    assert late.can_begin()
    with NoReads():  # type: ignore[no-untyped-call]
        late.begin(1, 0, RanksConfig())
    assert events == ["made", "waits for 2", "begins", "main queue waits"]
    engine.begin_step(2, 1e-2)
    engine.train_step(source, more=True)
    assert late.go_on(2) is None
    until = time.monotonic() + 60
    while late.go_on(3) is None:  # one process takes the rows when they are there
        assert time.monotonic() < until
    assert "done" not in events


class NoReads(TorchDispatchMode):
    """Nothing is read from a device, which would make the host wait for it."""

    def __torch_dispatch__(
        self, function: Any, types: Any, given: Any = (), words: Any = None
    ) -> Any:
        assert "_local_scalar_dense" not in str(function) and "nonzero" not in str(function)
        return function(*given, **(words or {}))
