"""The columns of a table of rank statistics, defined in one place.

The Parquet writer and reader, the measurement and the table in docs/statistics.md take their
columns from here; so does the report for those that it cannot do without. To add a statistic, add a
field to `pretrain.spectra.ProductStatistics` and its line below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_SPECTRA = "pretrain.spectra.ProductStatistics"
_PAIRS = "pretrain.spectra.PairStatistics"
_PROBE = "pretrain.ranks.probe.layer_rows"
_TOTALS = "pretrain.decay.sites.DecayRecord"
_RANKS = "pretrain.offline.ranks.measure_weights"
_NOT_QK_NORM = "; NaN for W_QK under QK-norm, see below"

Source = Literal["key", "spectrum", "product", "pair", "decay", "label"]
"""The source of a column's values: the row's name, singular values, statistics of the product, of
rotary pairs or of weight decay, or a label that only some tables have."""


@dataclass(frozen=True)
class Column:
    """One column of ``ranks.parquet``, or of the table that ``pretrain ranks --out`` writes."""

    name: str
    type: Literal["integer", "text", "number", "truth", "numbers"]
    """Type in Parquet: int64, string, double, bool, list of double."""
    unit: str
    meaning: str
    """Definition, in the Markdown of docs/statistics.md."""
    defined: str
    """The dotted name of the code that computes it."""
    source: Source
    of_sizes: bool = False
    """Undefined for W_QK with QK-norm, where logits do not depend on the factors' sizes."""
    of_the_law: bool = False
    """If heads share keys, the balance law for it applies to the group."""
    needed: bool = False
    """A report needs it."""


def _key(name: str, type_: Literal["integer", "text"], unit: str, meaning: str) -> Column:
    return Column(name, type_, unit, meaning, _PROBE, "key", needed=True)


def _product(
    name: str,
    unit: str,
    meaning: str,
    *,
    of_sizes: bool = False,
    of_the_law: bool = False,
    needed: bool = False,
) -> Column:
    meaning += _NOT_QK_NORM if of_sizes else ""
    where = f"{_SPECTRA}.{name}"
    return Column(name, "number", unit, meaning, where, "product", of_sizes, of_the_law, needed)


def _pair(name: str, unit: str, of_sizes: bool, of_the_law: bool = False) -> Column:
    meaning = "models with rotary positions, see below; NaN elsewhere"
    where = f"{_PAIRS}.{name}"
    return Column(name, "number", unit, meaning, where, "pair", of_sizes, of_the_law)


_FACTORS = {"a": "key, or output", "b": "query, or value"}


def _decay(figure: str, unit: str, meaning: str) -> tuple[Column, ...]:
    return tuple(
        Column(
            f"{figure}_{side}", "number", unit, f"{meaning} ({factor})", f"{_TOTALS}.{figure}",
            "decay", needed=True,
        )
        for side, factor in _FACTORS.items()
    )  # fmt: skip


def _frozen(meaning: str) -> tuple[Column, ...]:
    return tuple(
        Column(
            f"frozen_{side}", "truth", "–", f"{meaning} ({factor})", f"{_TOTALS}.frozen", "label"
        )
        for side, factor in _FACTORS.items()
    )


COLUMNS: tuple[Column, ...] = (
    _key("step", "integer", "updates", "updates made when it was measured"),
    Column("tokens", "integer", "tokens", "tokens trained on by then; empty if not known",
           _PROBE, "key"),
    _key("layer", "integer", "–", "number of the block, from 0"),
    _key("product", "text", "–", "`qk` (W_Kᵀ W_Q: A keys, B queries) or `vp` (P W_V: A output, "
         "B values)"),
    _key("level", "text", "–", "`head`, or `group` of heads that share a key"),
    _key("head", "integer", "–", "number of the query head, or of the group, from 0"),
    _product("pseudo_rank", "share of n", "k/n, where k is the smallest number of "
             "leading singular values that reach 95 % of Σσ (`ranks.threshold`), and n is the head "
             "width (never more than the model width), or the model width with "
             "`ranks.denominator: model`", needed=True),
    _product("nuclear_norm", "as σ", "Σσ", of_sizes=True, needed=True),
    _product("frobenius_bound", "as σ", "½(‖A‖² + ‖B‖²) ≥ nuclear norm", of_sizes=True,
             needed=True),
    _product("balance", "share", "nuclear_norm / frobenius_bound", of_sizes=True, of_the_law=True,
             needed=True),
    _product("discrepancy", "as σ", "‖AᵀA − BᵀB‖_F", of_sizes=True, of_the_law=True, needed=True),
    _product("theory_ceiling", "as σ", "√‖AᵀA − BᵀB‖_* · ½(‖A‖_* + ‖B‖_*) ≥ bound − nuclear norm "
             "(Prop. B.4 of the paper)", of_sizes=True),
    _product("frobenius_norm", "as σ", "√Σσ²"),
    _product("stable_rank", "singular values", "Σσ² / σ₁²"),
    _product("effective_rank", "singular values", "exp of the entropy of σ/Σσ (Roy & Vetterli "
             "2007)"),
    _product("participation_ratio", "singular values", "(Σσ)² / Σσ²"),
    _product("sigma_max", "as σ", "σ₁"),
    Column("nonfinite", "truth", "–", "a factor has a NaN or an infinity; the other statistics "
           "are then NaN", f"{_SPECTRA}.nonfinite", "product"),
    _pair("rope_pair_balance", "share", of_sizes=True, of_the_law=True),
    _pair("rope_pair_discrepancy", "as σ", of_sizes=True),
    _pair("rope_pairs_alive", "share of pairs", of_sizes=False),
    *_decay("decay", "1", "λ in use"),
    *_decay("exposure", "1", "Σ rate·λ over the updates so far, as applied: a "
            "[skipped](glossary.md#step-and-update) update adds nothing, and with `nuclear_every: "
            "n` every n-th update adds n·rate·λ"),
    *_decay("retention", "share", "∏(1 − rate·λ): the share that would be left of a weight if "
            "nothing else changed it"),
    *_frozen("not trained, so that no decay reaches it; only in tables of another loop whose model "
             "has a frozen part"),
    Column("singular_values", "numbers", "σ", "descending, with `ranks.spectra: true`; in older "
           "tables rounded to float32", f"{_SPECTRA}.singular_values", "spectrum"),
    Column("revision", "text", "–", "which of several models (only `pretrain ranks --out`)",
           _RANKS, "label"),
    Column("tower", "text", "–", "which stack of layers, in a model that has several (only "
           "`pretrain ranks --out`)", _RANKS, "label"),
)  # fmt: skip
BY_NAME = {column.name: column for column in COLUMNS}
KEYS = tuple(
    column.name for column in COLUMNS if column.source == "key" and column.name != "tokens"
)
"""The columns that name a row."""
TEXT_KEYS = tuple(name for name in KEYS if BY_NAME[name].type == "text")
NEEDED = tuple(column.name for column in COLUMNS if column.needed)
OF_THE_LAW = tuple(column.name for column in COLUMNS if column.of_the_law)
OF_SIZES = tuple(column.name for column in COLUMNS if column.of_sizes)
OF_PAIRS = tuple(column.name for column in COLUMNS if column.source == "pair")


def markdown() -> str:
    """The table of docs/statistics.md."""
    lines = ["| column | type | unit | definition | computed by |", "|---|---|---|---|---|"]
    lines += [
        f"| `{entry.name}` | {entry.type} | {entry.unit} | {entry.meaning} | `{entry.defined}` |"
        for entry in COLUMNS
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
