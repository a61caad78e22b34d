"""How the fields of the configs are set from outside of Python.

A field that `option` makes is a row of the table of options (baton/config.py). Command lines, their help, the
arguments of child processes and docs/options.md are made from it.
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from operator import attrgetter
from types import NoneType
from typing import Any, ClassVar, Protocol, TypeGuard, TypeVar, get_args

from baton.option_values import ANY, Values

REQUIRED: Any = MISSING  # in place of a default


class Config(Protocol):
    """A dataclass with fields that options set, and with others that are configs."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


T = TypeVar("T")
AnyConfig = TypeVar("AnyConfig", bound=Config)


@dataclass(frozen=True, slots=True)
class Option:
    """What a field is called outside, what --help says of it, and the values that it takes."""

    flag: str
    help: str
    values: Values
    unset: str | None  # what holds where it is not given, in words; None: the field's default

    @property
    def name(self) -> str:
        """What it is called where flags are not: in errors."""
        return self.flag.removeprefix("--")


def option(flag: str, default: T, help: str, values: Values = ANY, *, unset: str | None = None) -> T:
    """A field of a dataclass that an option sets: see Option."""
    return field(default=default, metadata={"option": Option(flag, help, values, unset)})


@dataclass(frozen=True, slots=True)
class Setting:
    """An option and the field that it sets, which may be one of a config inside the config."""

    option: Option
    path: str  # such as "engine.num_threads"
    type: Any  # of what is written
    default: Any  # as it is written; None: see Option.unset; REQUIRED: there is none

    @property
    def field(self) -> str:
        """The field's own name, which means the same in all configs."""
        return self.path.rpartition(".")[2]

    def value_in(self, config: Config) -> Any:
        """The field's value in a config."""
        return attrgetter(self.path)(config)

    def check(self, value: Any) -> None:
        """Raises StartupError where the option does not take the value."""
        check = self.option.values.check
        if check is not None and value is not None:
            check(self.option.name, value)

    def read(self, written: Any) -> Any:
        """The field's value; raises StartupError where the option does not take it."""
        value = self.option.values.read(written)
        self.check(value)
        return value

    def arguments(self, value: Any) -> list[str]:
        """What a command line says for the value: the inverse of `read`."""
        if value is None or value is False:
            return []
        if value is True:
            return [self.option.flag]
        written = self.option.values.write(value)
        return [f"{self.option.flag}={one}" for one in (written if isinstance(written, list) else [written])]


def settings_of(config: type[Config]) -> tuple[Setting, ...]:
    """All options of a config and of the configs inside it, in the order of the fields."""
    settings: list[Setting] = []
    for row in fields(config):
        if "option" in row.metadata:
            settings.append(_setting(row.metadata["option"], row))
        elif _is_config(row.type):
            inner = settings_of(row.type)
            settings += (replace(setting, path=f"{row.name}.{setting.path}") for setting in inner)
    return tuple(settings)


def check_options(config: Config) -> None:
    """Raises StartupError for the first value that its option does not take."""
    for setting in settings_of(type(config)):
        setting.check(setting.value_in(config))


def make_config(config: type[AnyConfig], values: Mapping[str, Any]) -> AnyConfig:
    """A config, and those inside it, of what `values` hold for their fields; the others have their defaults.

    `values` may hold more. Raises StartupError where the config does.
    """
    chosen = {row.name: values[row.name] for row in fields(config) if row.name in values}
    for row in fields(config):
        if "option" not in row.metadata and _is_config(row.type):
            chosen[row.name] = make_config(row.type, values)
    return config(**chosen)


def arguments_of(config: Config) -> list[str]:
    """The options that a command line spells the config with, those of the configs inside it included."""
    settings = settings_of(type(config))
    return [argument for setting in settings for argument in setting.arguments(setting.value_in(config))]


def _is_config(type_: Any) -> TypeGuard[type[Config]]:
    return is_dataclass(type_)


def _setting(option: Option, row: Field[Any]) -> Setting:
    default = row.default if option.unset is None else None
    if default is not REQUIRED and default is not None:
        default = option.values.write(default)
    own_type = next((part for part in get_args(row.type) if part is not NoneType), row.type)
    return Setting(option, row.name, option.values.written_as or own_type, default)
