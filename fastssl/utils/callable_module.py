"""``fastssl.evaluate`` is a package, ``fastssl.pretrain`` a module; each is also the function of that name."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """The class of a module ``fastssl.NAME`` that can be called as ``fastssl.api.NAME``. Python makes every module that
    is imported an attribute of its package: a function of that name there would be gone with the first import.
    """

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)

    @property
    def _function(self) -> Any:
        return getattr(import_module("fastssl.api"), self.__name__.rpartition(".")[2])

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function(*args, **options)
