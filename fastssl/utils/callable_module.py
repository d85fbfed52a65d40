"""``fastssl.evaluate`` is a package and ``fastssl.pretrain`` a module; each is also the function of that name."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType
from typing import Any

from fastssl.errors import require_posix


class CallableModule(ModuleType):
    """The class of a module ``fastssl.NAME`` that can be called as ``fastssl.api.NAME``: importing a module makes it an
    attribute of its package, in the place of a function of that name.
    """

    __signature__ = property(lambda self: inspect.signature(self._function))

    @property
    def _function(self) -> Any:
        require_posix()
        return getattr(import_module("fastssl.api"), self.__name__.rpartition(".")[2])

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function(*args, **options)
