"""Open lists of a recipe: their entries are built-in classes, or classes of the user.

An entry has a ``kind``, which names two classes: a section that validates the entry, and the class
that is made from it. There is one `Kinds` for each open list.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from pydantic import ValidationError, ValidationInfo, create_model

from pretrain.config.explain import explain, explained
from pretrain.config.extension import (
    PINS,
    Extension,
    ExtensionError,
    Home,
    find,
    names,
    running_files,
)
from pretrain.config.section import Section
from pretrain.errors import ENDS

FOLDER = "folder"
"""Key of a validation's context: the folder of code files (`pretrain.config.extension.find`)."""


class KindSection(Section):
    """An entry of an open list; subclasses add keys of their own."""

    kind: str


Entry = TypeVar("Entry", bound=KindSection)
Made = TypeVar("Made")
Registered = TypeVar("Registered", bound=type[Any])


class Kinds(Generic[Entry, Made]):
    """The classes that the entries of one list can have."""

    def __init__(
        self,
        noun: str,
        group: str,
        package: str,
        section: type[Entry],
        base: type[Made],
        check: Callable[[Extension], None] | None = None,
    ) -> None:
        """
        Args:
            noun: ``policy``, for messages.
            group: the group of entry points, such as ``rankdecay.policies``.
            package: its modules register the built-in classes; empty: there are none.
            section: base class of the sections.
            base: base class of the objects; its class attribute ``Config`` is a section.
            check: further checks of a user's class; raises `ExtensionError`.
        """
        self._noun, self._package = noun, package
        self._section, self._base, self._check = section, base, check
        self.group = group
        self._built_in: dict[str, type[Made]] = {}
        self._own: dict[type[KindSection], Extension] = {}
        self._pinned: dict[Extension, type[Entry]] = {}
        self._loaded = False
        self._absent: type[Entry] = create_model(
            "Absent", __base__=section, __module__=__name__, __cls_kwargs__={"extra": "allow"}
        )

    def built_in(self, kind: str) -> Callable[[Registered], Registered]:
        """Register a class of the package under the kind that recipes use."""

        def register(cls: Registered) -> Registered:
            self._built_in[kind] = cls
            return cls

        return register

    def built_in_sections(self) -> dict[str, type[Entry]]:
        """The section of each built-in kind, in the order of their names."""
        self._load()
        return {kind: self._built_in[kind].Config for kind in sorted(self._built_in)}  # type: ignore[attr-defined]

    def validate(self, value: Any, info: ValidationInfo) -> Entry:
        """Validate an entry of a recipe by the class of its kind (a pydantic validator)."""
        if isinstance(value, self._section):
            return value
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
            raise explained(f"kind: missing; a {self._noun} is a mapping with a kind")
        return self.section(value, (info.context or {}).get(FOLDER))

    def section(self, entry: dict[str, Any], folder: Home = None) -> Entry:
        """The section of an entry, validated.

        Args:
            folder: of the recipe (`pretrain.config.extension.find`).

        Raises:
            PydanticCustomError: naming the key and what to do.
        """
        try:
            section, values = self._class_of(entry, folder)
        except ExtensionError as error:
            raise explained(f"kind: {error}") from None
        try:
            parsed = section.model_validate(values)
        except ValidationError as error:
            raise explained(explain(error.errors()[0], section)) from None
        except ENDS:
            raise
        except BaseException as error:  # of a user's validator
            own = self._own.get(section)
            if own is None or own.code is None:
                raise
            raise explained(
                f"kind: {own.kind}: Config fails: {own.code.place_of(error)}"
            ) from error
        if section in self._own and (lost := _lost_in_json(parsed)):
            raise explained(
                f"kind: {parsed.kind}: a run folder could not give its Config back ({lost}); use "
                "values that JSON has, keys without alias, and finite numbers"
            )
        return parsed

    def class_of(self, section: KindSection) -> type[Made]:
        """The class for a section whose code is loaded in this process (see `absent`)."""
        extension = self.own_of(section)
        cls: type[Made] = extension.cls if extension else self._built_in[section.kind]
        return cls

    def own_of(self, section: KindSection) -> Extension | None:
        """The user's class of a section, if it has one."""
        return self._own.get(type(section))

    def absent(self, section: KindSection) -> str:
        """A message about a user's class that is not loaded in this process; empty if it is."""
        if not isinstance(section, self._absent):
            return ""
        pins = section.model_extra or {}
        if "sha256" not in pins:
            return f"{section.kind} belongs to {pins['package']}, which is not loaded; install it"
        loaded = ", ".join(f"{code.path.name} {code.sha256}" for code in running_files())
        return (
            f"{section.kind} with SHA-256 {pins['sha256']} is not loaded ({loaded or 'no file'} "
            "is); name the file with --code (a run keeps a copy under code/)"
        )

    def _class_of(
        self, values: Mapping[str, Any], folder: Home
    ) -> tuple[type[Entry], Mapping[str, Any]]:
        kind = values["kind"]
        self._load()
        if kind in self._built_in:
            return self._built_in[kind].Config, values  # type: ignore[attr-defined]
        extension = find(self.group, kind, values, folder)
        if extension is not None:
            return self._pin(extension), {**values, "kind": extension.kind}
        if any(pin in values for pin in PINS):
            return self._absent, values
        kinds = ", ".join([*sorted(self._built_in), *names(self.group)])
        raise ExtensionError(f"{kind!r} is not a {self._noun}; known: {kinds}, or FILE.py:CLASS")

    def _load(self) -> None:
        if self._loaded or not self._package:
            return
        self._loaded = True
        package = import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            import_module(f"{self._package}.{module.name}")

    def _pin(self, extension: Extension) -> type[Entry]:
        """The section of a user's class, with the key that pins its code."""
        if extension not in self._pinned:
            self._check_class(extension)
            config: type[Entry] = extension.cls.Config
            key, value = extension.pin
            fields: dict[str, Any] = {key: (str, value)}
            pinned = create_model(config.__name__, __base__=config, **fields)
            self._pinned[extension], self._own[pinned] = pinned, extension
        return self._pinned[extension]

    def _check_class(self, extension: Extension) -> None:
        cls, base, section = extension.cls, self._base, self._section
        if not (isinstance(cls, type) and issubclass(cls, base)):
            place = f"{base.__module__}.{base.__name__}"
            raise ExtensionError(f"{extension.kind} is not a class derived from {place}")
        config = getattr(cls, "Config", None)
        if not (isinstance(config, type) and issubclass(config, section)):
            place = f"{section.__module__}.{section.__name__}"
            raise ExtensionError(f"{extension.kind}.Config is not a class derived from {place}")
        for name, method in vars(base).items():
            if not inspect.isfunction(method) or (name[0] == "_" and name != "__init__"):
                continue
            signature = inspect.signature(method)
            try:
                inspect.signature(getattr(cls, name)).bind(*range(len(signature.parameters)))
            except (TypeError, ValueError):
                raise ExtensionError(
                    f"{extension.kind}.{name} has another signature than "
                    f"{name}({', '.join(signature.parameters)})"
                ) from None
        if self._check is not None:
            self._check(extension)


def _lost_in_json(section: KindSection) -> str:
    """What keeps a section from being read again from a run folder; empty if nothing does."""
    try:
        reread = type(section).model_validate(json.loads(section.model_dump_json()))
    except ValidationError as error:
        return explain(error.errors()[0], type(section))
    except ValueError as error:  # pydantic's error of what it cannot write
        return " ".join(str(error).split())[:200]
    return "" if reread == section else "it comes back with other values"
