"""Everything this library raises on purpose.

Catch wide (`PeftError`) or narrow. Each class also inherits the builtin that callers of the PEFT API expect, so
`except ValueError` keeps working.

    PeftError
    ├── ConfigError (ValueError)                 a config that contradicts itself, or says what no method knows
    │   └── UnknownOptionError (TypeError)       an option that a config does not have
    ├── TargetError (ValueError)                 a requested module or parameter that can't be adapted
    │   └── NoMatchingPeftModuleError            nothing in the model matches
    ├── MethodError (TypeError)                  a method whose class contradicts itself; for who writes methods
    ├── UnsupportedError (NotImplementedError)   a combination that mathematics forbids
    ├── ShapeError (ValueError)                  matrices or vectors whose sizes do not fit together
    ├── AdapterNameError (KeyError, ValueError)  no adapter, or already an adapter, of that name
    ├── StateError (RuntimeError)                the call is right, but not in the state the model is in
    ├── LoadError (RuntimeError)                 a file does not fit the model
    │   ├── AdapterNotFoundError (FileNotFoundError, ValueError)   no such folder, repository or file in it
    │   ├── CorruptFileError (ValueError)        a file that is damaged or hostile
    │   └── BaseMismatchError                    an adapter made for another base model
    └── SaveError (OSError)                      nothing was written; what was there before is whole

    PeftWarning (UserWarning)                    going on is safe, but you would want to know
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftError(Exception):
    """Base of every error of this library."""


class ConfigError(PeftError, ValueError):
    """A config contradicts itself, or holds a value that its method does not know."""


class UnknownOptionError(ConfigError, TypeError):
    """A config was given an option that it does not have."""


class TargetError(PeftError, ValueError):
    """A module or parameter was requested that does not exist, or can't be adapted by this method."""


class NoMatchingPeftModuleError(TargetError):
    """Nothing in the model matches the targets of the config."""


class MethodError(PeftError, TypeError):
    """The class of a method contradicts itself, or a hook of it returns what it may not. No config can mend that."""


class UnsupportedError(PeftError, NotImplementedError):
    """The combination has no mathematical meaning (or none that the file format can hold)."""


class ShapeError(PeftError, ValueError):
    """Matrices or vectors whose sizes do not fit together."""


class AdapterNameError(PeftError, KeyError, ValueError):
    """There is no adapter of that name, or there is one already."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class StateError(PeftError, RuntimeError):
    """The call is valid, but not in the state that the model or adapter is in."""


class LoadError(PeftError, RuntimeError):
    """An adapter file does not fit the model it is loaded into.

    `report` holds the `peft.checkpoint.report.LoadReport`, where there is one.
    """

    report: object | None = None


class AdapterNotFoundError(LoadError, FileNotFoundError, ValueError):
    """There is no such folder or repository, or it does not hold the file."""


class CorruptFileError(LoadError, ValueError):
    """A file is damaged, truncated, or made to do harm. Nothing in it was used."""


class BaseMismatchError(LoadError):
    """The adapter was trained on another base model."""


class SaveError(PeftError, OSError):
    """Saving failed. What stood in the directory before is untouched."""


class PeftWarning(UserWarning):
    """Going on is safe, but the result may not be what was meant."""


def nearest(name: str, names: Iterable[str], n: int = 1) -> str:
    """A hint that names the closest of `names`: `" Did you mean 'q_proj'?"`, or an empty string.

    >>> nearest("v_porj", ["q_proj", "v_proj"])
    " Did you mean 'v_proj'?"
    """
    plain = {other.lower(): other for other in names}
    found = [plain[match] for match in difflib.get_close_matches(name.lower(), list(plain), n=n, cutoff=0.5)]
    return f" Did you mean {' or '.join(repr(f) for f in found)}?" if found else ""
